"""Study files: those that come along are what they say, and each fault is named before a cell is trained."""

import pytest

from gqe_jax.cli.main import main
from gqe_jax.config import ConfigError
from gqe_jax.config_files import load_config
from gqe_jax.configs import shipped_studies
from gqe_jax.flops import flops_per_token, parameter_count
from gqe_jax.study.definition import cells, read_study

STUDY = """
reference = "a"
tokens = 20_480
seeds = [3, 5]
overrides = ["train.eval_every=0"]
[arms.a]
config = "gqe_250m:laptop"
[arms.b]
config = "gqe_250m:laptop,router=fixed"
overrides = ["model.d_ff=256"]
"""


def write(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("size, millions, tokens", [("laptop", 1, 2e6), ("small", 29, 1.07e9), ("paper", 248, 30e9)])
def test_table_2_is_what_it_says(size, millions, tokens):
    """Head counts of the paper's Table 2 and of the controls, at a size and a budget; the larger model has the FLOPs of
    GQE per token. Each cell's command gives the cell's configuration: what was checked is what trains."""
    planned = cells(read_study(f"table2:{size}"))
    first = {cell.arm: cell for cell in reversed(planned)}
    attending = {arm: cell.config.model.attention.attending_heads for arm, cell in first.items()}
    assert attending == {
        "gqe": 9, "gqa": 16, "weighted-concat": 8, "hard-concat": 8, "gqe-fixed": 9, "gqe-random": 9, "sqa-8": 8,
        "sqa-9": 9, "larger": 4,
    }  # fmt: skip
    model = {arm: cell.config.model for arm, cell in first.items()}
    assert round(parameter_count(model["gqe"])["total"] / 1e6) == millions
    context = model["gqe"].context
    ratio = flops_per_token(model["larger"], context) / flops_per_token(model["gqe"], context)
    assert abs(ratio - 1) < 0.01 and parameter_count(model["larger"])["total"] > parameter_count(model["gqe"])["total"]
    for cell in first.values():
        assert load_config(cell.spec, cell.overrides) == cell.config
        step = cell.config.data.batch_size * context
        assert abs(cell.config.train.steps * step - tokens) <= max(step, 0.05 * tokens)
    assert len(planned) == 9 * len({cell.seed for cell in planned}) and planned[0].seed == planned[8].seed


def test_all_studies_that_come_along_load():
    assert {f"table2:{size}" for size in ("laptop", "small", "paper")} <= set(shipped_studies())
    for name in shipped_studies():
        assert cells(read_study(name))


def test_budget_seeds_and_overrides(tmp_path):
    """10 steps of 2048 tokens; warm-up and decay keep their tenth and their fifth; a seed is that of weights and rows;
    overrides of the study, the arm and the command line all hold."""
    study = read_study(write(tmp_path, STUDY))
    planned = cells(study, ["optimizer.b2=0.99"])
    assert [cell.name for cell in planned] == ["a-3", "b-3", "a-5", "b-5"]
    for cell in planned:
        config = cell.config
        assert (config.train.steps, config.optimizer.warmup_steps, config.optimizer.decay_steps) == (10, 1, 2)
        assert config.train.seed == config.data.seed == cell.seed
        assert (config.train.eval_every, config.optimizer.b2) == (0, 0.99)
        assert config.model.d_ff == (384 if cell.arm == "a" else 256)
        assert load_config(cell.spec, cell.overrides) == config
        assert cell.command("x")[:5] == ["train", "--config", cell.spec, "--run", "x"]


def test_a_part_of_a_study(tmp_path):
    """The reference stays, whatever arms are chosen; unknown names are refused with what there is."""
    study = read_study(write(tmp_path, STUDY))
    part = study.part(["b"], [5])
    assert list(part.arms) == ["a", "b"] and part.seeds == (5,)
    assert list(study.part([], None).arms) == ["a"]
    with pytest.raises(ConfigError, match="no such arm: known: a, b"):
        study.part(["xyz"], None)
    with pytest.raises(ConfigError, match="has the seeds 3, 5: choose among these"):
        study.part(None, [4])


@pytest.mark.parametrize(
    "change, words",
    [
        (('reference = "a"', 'reference = "c"'), "reference='c' is no arm"),
        (("seeds = [3, 5]", "seeds = [3]"), "at least two different whole numbers, as one seed gives no interval"),
        (("seeds = [3, 5]", "seeds = [3, 3]"), "at least two different"),
        (("seeds = [3, 5]", "seeds = [3, -1]"), "whole numbers"),
        (("tokens = 20_480", "tokens = 0"), "tokens=0, which must be a whole number from 1"),
        (("tokens = 20_480", ""), "lacks tokens"),
        (("tokens", "token"), "lacks tokens; has the unknown 'token'"),
        (("[arms.b]", '[arms."../b"]'), "names a folder, so use small letters"),
        (("[arms.b]", "[arms.b"), "is no TOML"),
        (('config = "gqe_250m:laptop"', ""), "arms.a: lacks config"),
        (('overrides = ["model.d_ff=256"]', "overrides = 3"), "overrides=3, which must be a list of texts"),
    ],
)
def test_faults_of_the_file_are_named(tmp_path, change, words):
    text = STUDY.replace(*change)
    assert text != STUDY
    with pytest.raises(ConfigError) as error:
        read_study(write(tmp_path, text))
    assert words in str(error.value)


def test_every_arm_that_cannot_be_trained_is_listed(tmp_path, capsys):
    """All faults at once, before anything is trained or written: a long study must not die of its last arm."""
    text = STUDY.replace("model.d_ff=256", "model.d_fff=256") + '[arms.c]\nconfig = "gqx_250m"\n'
    text += '[arms.d]\nconfig = "gqe_250m:laptop"\noverrides = ["train.seed=1"]\n'
    out = tmp_path / "out"
    assert main(["study", "run", write(tmp_path, text), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert "3 arm(s) of mine cannot be trained" in err
    assert "arm b: unknown config key 'model.d_fff': did you mean 'd_ff'?" in err
    assert "arm c: --config=gqx_250m: no such file" in err
    assert "arm d: the override 'train.seed=1' sets what the study sets" in err
    assert not out.exists()


def test_arms_of_unequal_tokens_are_refused(tmp_path):
    """Only equal tokens are compared: 10 steps of 8 rows are 7 of 12 rows and some."""
    study = read_study(write(tmp_path, STUDY.replace("model.d_ff=256", "data.batch_size=12")))
    with pytest.raises(ConfigError, match=r"not the same whole number of steps' tokens .*\(a 20,480, b 21,504"):
        cells(study)


def test_a_budget_below_a_step_is_refused(tmp_path):
    study = read_study(write(tmp_path, STUDY.replace("20_480", "1000")))
    with pytest.raises(ConfigError, match="tokens=1000 is less than half a step"):
        cells(study)


def test_no_such_study(capsys):
    assert main(["study", "table", "table2:laptp", "--out", "x"]) == 2
    assert "nor one that comes with gqe_jax; did you mean 'table2:laptop'?" in capsys.readouterr().err


def test_dry_run_prints_the_commands_and_what_a_slice_takes(tmp_path, capsys):
    """One command a cell that parses as `gqe train`, and a line of times for each arm; nothing is written."""
    out = tmp_path / "out"
    words = ["study", "run", "table2:paper", "--out", str(out), "--dry-run", "--topology", "v5e:4x4", "--arms", "gqa"]
    assert main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    commands = [line for line in printed if line.startswith("gqe train ")]
    assert len(commands) == 6 and len({line.split("--run ")[1].split()[0] for line in commands}) == 6
    times = [line.split()[0] for line in printed if " to " in line]
    assert times == ["gqe", "gqa", "all,"] and "16 devices" in "\n".join(printed)
    assert not out.exists()


def test_options_of_run(tmp_path, capsys):
    path = write(tmp_path, STUDY)
    assert main(["study", "run", path, "--out", "x", "-j", "0"]) == 2
    assert "--jobs=0 must be at least 1" in capsys.readouterr().err
    assert main(["study", "run", path, "--out", "x", "--topology", "v5e:4x4"]) == 2
    assert "add --dry-run" in capsys.readouterr().err
