"""`gqe heads` on runs written here, whose losses lie on planted curves."""

import dataclasses
import json

import pytest

from gqe_jax.attention import GQAConfig, GQEConfig
from gqe_jax.cli.main import main
from gqe_jax.config import ModelConfig, RunConfig, TrainConfig
from gqe_jax.config_dict import to_dict
from gqe_jax.config_files import load_config
from gqe_jax.flops import parameter_count

WIDTHS = (32, 64, 96, 128, 192)
PLANTED = {"dense16": (40.0, 0.25, 1.2), "dense4": (44.0, 0.25, 1.25), "gqe": (41.0, 0.25, 1.22)}
HEADS = {
    "dense16": GQAConfig(num_query_heads=16, num_kv_heads=8, head_dim=16),
    "dense4": GQAConfig(num_query_heads=4, num_kv_heads=4, head_dim=16),
    "gqe": GQEConfig(num_query_experts=16, num_kv_heads=8, head_dim=16),
}


def write_run(folder, attention, width, constants, *, evaluated=10, vocab_size=259):
    sizes = {"d_model": width, "num_layers": 2, "d_ff": 3 * width, "context": 64}
    model = ModelConfig(vocab_size=vocab_size, attention=attention, **sizes)
    counts = parameter_count(model)
    amplitude, exponent, floor = constants
    loss = amplitude * (counts["total"] - counts["embedding"]) ** -exponent + floor
    folder.mkdir()
    config = RunConfig(model=model, train=TrainConfig(steps=300))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    line = {"step": 300 if evaluated else 200, "eval/loss": loss}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    return {
        name: [write_run(tmp_path / f"{name}_{width}", HEADS[name], width, PLANTED[name]) for width in WIDTHS]
        for name in HEADS
    }


def gqe(*words):
    return main(["heads", *map(str, words)])


def test_curves_search_and_comparison(runs, tmp_path, capsys):
    """The planted constants come back through runs on disk, and through the file that --save writes; GQE stands beside
    its rivals with their costs, and losses are given where runs of these heads were."""
    picture, saved = tmp_path / "heads.png", tmp_path / "curves.json"
    given = [run for each in runs.values() for run in each]
    options = ["--target", 2.0, "--context", 2048, 131072, "--gqe", "16,8,1"]
    assert gqe("--runs", *given, *options, "--save", saved, "--plot", picture) == 0
    out = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    fits = {tuple(fit["heads"]): fit for fit in json.loads(saved.read_text())["fits"]}
    for key, name in (((16, 8), "dense16"), ((4, 4), "dense4"), ((16, 8, 1), "gqe")):
        _, exponent, floor = PLANTED[name]
        assert abs(fits[key]["exponent"] - exponent) < 1e-4 and abs(fits[key]["floor"] - floor) < 1e-3
    rows = {line.split("  ")[1]: line for line in out.splitlines() if line.startswith("  ")}
    assert rows["SQA, k·G heads"].endswith("not known") and rows["SQA, k·G + 1 heads"].endswith("not known")
    assert rows["dense GQA"].split()[-1] == "2.0000"
    assert rows["larger, fewer heads"].split()[3:5] == ["4", "4"]  # behind its name: of GQE's 9 heads, the fewer
    flops = {name: float(rows[name].split()[-3]) for name in ("GQE", "larger, fewer heads")}
    assert flops["GQE"] == pytest.approx(flops["larger, fewer heads"], rel=0.01)  # to the digits that are printed
    assert gqe("--constants", saved, *options) == 0
    again = capsys.readouterr().out
    assert again[again.index("loss 2 at") :] == out[out.index("loss 2 at") :]


def test_the_command_it_prints_is_a_configuration(runs, capsys):
    """The line can be pasted: it gives the heads that were recommended, at a size near the one that was found."""
    assert gqe("--runs", *runs["dense16"], "--target", 1.6, "--context", 8192) == 0
    (line,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  gqe train"))
    overrides = [word.removeprefix("--config.") for word in line if word.startswith("--config.")]
    model = load_config(line[line.index("--config") + 1], overrides).model
    assert (model.attention.num_query_heads, model.attention.num_kv_heads, model.context) == (16, 8, 8192)
    counts = parameter_count(model)
    wanted = (40.0 / 0.4) ** 4
    assert 0.8 < (counts["total"] - counts["embedding"]) / wanted < 1.25


def refused(capsys, *words):
    assert gqe(*words) == 2
    return capsys.readouterr().err


def test_fewer_than_four_sizes_are_refused(runs, tmp_path, capsys):
    """Each choice of heads is named with its count; two seeds of a size are one size."""
    again = write_run(tmp_path / "again", HEADS["dense4"], 64, PLANTED["dense4"])
    given = [*runs["dense16"][:2], *runs["dense4"][:3], again]
    err = refused(capsys, "--runs", *given, "--target", 2.0, "--context", 2048)
    assert "dense, 16 query heads on 8 KV heads: 2; dense, 4 query heads on 4 KV heads: 3" in err
    assert "train more sizes of each" in err


def test_runs_that_cannot_be_fitted_are_refused(runs, tmp_path, capsys):
    """An unfinished run has no final loss, a fixed router is another model, other tokens give other losses."""
    options = ["--target", 2.0, "--context", 2048]
    unfinished = write_run(tmp_path / "unfinished", HEADS["dense4"], 64, PLANTED["dense4"], evaluated=0)
    router = dataclasses.replace(HEADS["gqe"].router, kind="fixed")
    fixed = write_run(tmp_path / "fixed", dataclasses.replace(HEADS["gqe"], router=router), 64, PLANTED["gqe"])
    err = refused(capsys, "--runs", *runs["dense4"], unfinished, fixed, *options)
    assert f"{unfinished} has no evaluation of its last step, 300; {fixed} is neither dense nor GQE" in err
    other = write_run(tmp_path / "other", HEADS["dense4"], 64, PLANTED["dense4"], vocab_size=300)
    err = refused(capsys, "--runs", *runs["dense4"], other, *options)
    assert "model.vocab_size=259" in err and "300: their losses are not of one curve" in err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--target", 1.0, "--context", 2048], "is reached by no size: the curves end at 1.2"),
        (["--target", -1, "--context", 2048], "--target=-1.0 is no loss"),
        (["--target", 2.0, "--context", 0], "--context=0 must be at least 1"),
        (["--target", 2.0, "--context", 64, "--gqe", "16,8"], "query experts, KV heads and top_k"),
        (["--target", 2.0, "--context", 64, "--gqe", "16,8,3"], "top_k at most their ratio"),
        (["--target", 2.0, "--context", 64, "--gqe", "8,4,1"], "of which no curve was given"),
    ],
)
def test_options_that_say_nothing_are_refused(runs, capsys, options, words):
    """Each is named with what to give instead."""
    assert words in refused(capsys, "--runs", *runs["dense16"], *options)


def test_a_damaged_file_of_constants_is_refused(tmp_path, capsys):
    """The file comes from outside: every field is checked."""
    path = tmp_path / "curves.json"
    fit = {"heads": [8, 4], "amplitude": 40.0, "exponent": 0, "floor": 1.2, "residual": 0.1}
    path.write_text(json.dumps({"head_dim": 64, "vocab_size": 259, "fits": [fit]}))
    err = refused(capsys, "--constants", path, "--target", 2.0, "--context", 64)
    assert "has exponent=0, which must be a finite number above 0" in err
