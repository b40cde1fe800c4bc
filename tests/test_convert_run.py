"""`gqe convert`: runs made of runs, what stays to the bit, that other verbs take them, and input that is refused."""

import dataclasses
import hashlib
import shutil

import numpy as np
import pytest
import tiny_run
from converted import logits, read_run, tokens

from gqe_jax.cli import main as cli
from gqe_jax.config_files import load_config
from gqe_jax.convert import converting
from gqe_jax.pytorch.exporting import export_hf
from gqe_jax.runs.load import load_model
from gqe_jax.runs.saved_model import open_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with prepared rows and `dense`, a run of eight steps."""
    directory = tmp_path_factory.mktemp("convert")
    with tiny_run.quick_compiles(tmp_path_factory.mktemp("cache")):
        tiny_run.prepare_tiny(directory / "data")
        file = tiny_run.write_config(directory / "tiny.py", directory / "data")
        assert cli.main(["train", "--config", f"{file}:gqa", "--run", str(directory / "dense")]) == 0
        yield directory


def convert(place, out, *options):
    line = ["convert", "--run", str(place / "dense"), "--out", str(place / out), "--calibration-rows", "8"]
    return cli.main([*line, "--heldout-rows", "16", *options])


def hashes(run):
    return {path: hashlib.sha256(x.tobytes()).hexdigest() for path, x in read_run(run).items()}


KINDS = {
    "kv1": (["--to", "gqa", "--num-kv-heads", "1"], "gqa (num_query_heads 4, num_kv_heads 1, head_dim 8)"),
    "sqa": (["--to", "gqa", "--num-query-heads", "2"], "gqa (num_query_heads 2, num_kv_heads 2, head_dim 8)"),
    "gqe": (["--to", "gqe", "--reconstruct", "4"], "top_k 1 of 2, gqe, router learned)"),
    "mla": (["--to", "mla", "--latent", "12", "--rope-dim", "4"], "num_kv_heads 2, head_dim 8, latent_dim 12, rope_d"),
}


@pytest.mark.parametrize("name", KINDS)
def test_converted_runs_train_and_generate(place, capsys, name):
    """Nothing but the attention changes, and of GQE neither do keys and values; the printed line trains the run on, and
    generation samples from it."""
    options, summary = KINDS[name]
    assert convert(place, name, *options) == 0
    out, err = capsys.readouterr()
    assert summary in out and ", 0 s left" in err
    assert ("the same with a fixed router" in out) == (name == "gqe")
    assert ("partial rotary, freqfold 2" in out) == ("50.0% of the run's 32" in out) == (name == "mla")
    before, after = read_run(place / "dense"), read_run(place / name)
    changed = {path for path in before.keys() & after.keys() if not np.array_equal(before[path], after[path])}
    kept_attention = {"k_proj.kernel", "v_proj.kernel"} if name != "kv1" else set()  # or gone, of MLA
    wanted = {"q_proj.kernel", "k_proj.kernel", "v_proj.kernel", "o_proj.kernel"} - kept_attention
    assert changed == {f"layers.attention.{path}" for path in wanted}

    config = load_config(str(place / name / "config.py"))
    assert config == load_model(place / name).config
    assert config.train.steps == 1 and config.data.path == str(place / "data")
    shutil.copytree(place / name, place / f"{name}_trained")
    line = out.splitlines()[-1].split()[1:]
    assert line[:2] == ["train", "--config"]
    assert cli.main([*line[:-1], str(place / f"{name}_trained")]) == 0
    assert cli.main(["generate", "--run", str(place / name), "--prompt", "the", "--max-new-tokens", "2"]) == 0


def test_equal_inputs_and_seed_give_equal_bits(place):
    """Router, calibration rows and their order all follow from the seed."""
    options = ["--to", "gqe", "--reconstruct", "2"]
    for name, seed in (("first", "3"), ("again", "3"), ("other", "4")):
        assert convert(place, name, "--seed", seed, *options) == 0
    assert hashes(place / "again") == hashes(place / "first")
    assert hashes(place / "other") != hashes(place / "first")


@pytest.mark.parametrize("name", ["kv1", "gqe", "mla"])
def test_exports_of_converted_runs(place, name):
    """An ordinary Llama with fewer KV heads, and GQE and MLA through our own file: the same logits in PyTorch."""
    torch = pytest.importorskip("torch")
    import torch_folder

    if not (place / name).exists():
        assert convert(place, name, *KINDS[name][0]) == 0
    why = export_hf(open_model(place / name), place / f"{name}_exported")
    assert why.startswith("Llama") == (name == "kv1")
    ids = tokens(259)
    with torch.no_grad():
        wanted = torch_folder.load(place / f"{name}_exported").eval()(torch.tensor(ids).long()).logits.numpy()
    np.testing.assert_allclose(logits(load_model(place / name).model, ids), wanted, atol=2e-4)


@pytest.mark.slow
def test_several_devices_compute_the_same_conversion(place):
    """Parameters over `fsdp`, tokens over `context` in another order: the sums over tokens, and so the fitted output
    projections, are the same up to the order of float32 additions."""
    assert convert(place, "one", "--to", "gqe") == 0
    options = ["--calibration-rows", "8", "--heldout-rows", "16", "--to", "gqe", "--mesh", "fsdp=2,context=2"]
    flags = f"{tiny_run.QUICK_FLAGS} --xla_force_host_platform_device_count=4"
    process = tiny_run.start_gqe("convert", "--run", place / "dense", "--out", place / "four", *options, flags=flags)
    _, error = process.communicate()
    assert process.returncode == 0, error
    one, four = read_run(place / "one"), read_run(place / "four")
    assert one.keys() == four.keys()
    for path, x in one.items():
        np.testing.assert_allclose(four[path], x, atol=2e-4, err_msg=path)


def test_conversion_to_the_same_sizes_returns_the_same_bits(place, capsys):
    assert convert(place, "same", "--to", "gqa", "--num-kv-heads", "2") == 0
    assert "unchanged" in capsys.readouterr().out
    assert hashes(place / "same") == hashes(place / "dense")


def test_exact_conversion_is_the_same_model(place):
    """k = M with a fixed router computes the dense function; its loss is not fitted away from it."""
    assert convert(place, "exact", "--to", "gqe", "--top-k", "2", "--exact") == 0
    ids = tokens(259)
    dense, exact = (logits(load_model(place / name).model, ids) for name in ("dense", "exact"))
    np.testing.assert_allclose(exact, dense, atol=1e-5)


def test_frequencies_are_folded_while_the_loss_of_partial_rotary_falls(place, capsys, monkeypatch):
    """f = 1, 2, 4 with head_dim 8 and --rope-dim 8. Losses are given here: they fall at 2 and rise at 4, so that 2 is
    taken, as by name; where they rise at 2 already, 4 is not tried and 1 is taken."""
    options = ["--to", "mla", "--latent", "12", "--rope-dim", "8", "--calibration-rows", "2"]
    for fold in ("1", "2"):
        assert convert(place, f"fold{fold}", *options, "--freqfold", fold) == 0
    evaluate = converting.evaluate_model
    for name, losses, tried in (("auto2", [1.0, 3.0, 2.0, 2.5, 3.0], 3), ("auto1", [1.0, 2.0, 2.5, 3.0], 2)):
        given = iter(losses)
        monkeypatch.setattr(
            converting,
            "evaluate_model",
            lambda *args, given=given, **options: dataclasses.replace(evaluate(*args, **options), loss=next(given)),
        )
        capsys.readouterr()
        assert convert(place, name, *options) == 0
        out, err = capsys.readouterr()
        assert out.count("partial rotary, freqfold") == tried and err.splitlines()[-1].endswith(", 0 s left")
        assert hashes(place / name) == hashes(place / f"fold{name[-1]}")
    assert hashes(place / "fold1") != hashes(place / "fold2")


def test_calibration_rows_are_training_rows(place, monkeypatch):
    """Held-out rows stay unseen: the rows that a conversion reads are all among the training split's."""
    seen = []
    read = converting.TrainingStream.read

    def watched(stream, positions):
        seen.append(([stream[position] for position in positions], [len(rows) for rows in stream.rows]))
        assert all(rows.manifest.train.rows == len(rows) for rows in stream.rows)
        return read(stream, positions)

    monkeypatch.setattr(converting.TrainingStream, "read", watched)
    assert convert(place, "watched", "--to", "gqa", "--num-query-heads", "2") == 0
    numbers = [row for rows, _ in seen for _, row in rows]
    assert len(numbers) == len(set(numbers)) == 8


def test_a_fitted_conversion_is_better_than_one_that_is_not(place, capsys):
    """The relative error of every layer's output falls: each is a least square from the other's start."""
    errors = []
    for name, options in (("fitted", []), ("unfitted", ["--no-refit", "--no-align"])):
        assert convert(place, name, "--to", "gqa", "--num-kv-heads", "1", *options) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        errors.append([float(line[1]) for line in lines if line and line[0] in ("0", "1")])
    assert (np.array(errors[0]) < 0.95 * np.array(errors[1])).all()


def test_a_conversion_that_is_stopped_leaves_nothing(place, monkeypatch):
    """What is written appears in one rename, after all of it is there."""

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(converting, "config_file", stopped)
    before = sorted(place.iterdir())
    assert convert(place, "stopped", "--to", "gqa", "--num-kv-heads", "1") == 130
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize(
    "options, said",
    [
        ("--to gqa", "--to gqa needs to know how many heads are left"),
        ("--to gqa --num-kv-heads 2 --top-k 1", "--top-k says nothing of a conversion to gqa: leave it out, or use"),
        ("--to gqe --num-kv-heads 1", "--num-kv-heads says nothing of a conversion to gqe"),
        ("--to gqe --calibration-rows 999999", "--calibration-rows=999999 needs 999999 training rows"),
        ("--to gqe --calibration-rows 0", "--calibration-rows=0 is no positive multiple"),
        ("--to gqa --num-kv-heads 1 --latent 4", "--latent says nothing of a conversion to gqa: leave it out"),
        ("--to mla --latent 12", "--rope-dim=64 is neither head_dim / c, where c divides head_dim / 2 = 4, nor a mult"),
        ("--to mla --rope-dim 4 --latent 29", "--latent=29 must lie in 1..28: keys and values have 2 · num_kv_heads"),
        ("--to mla --rope-dim 4 --latent 0", "--latent=0 must lie in 1..28"),
        ("--to mla --rope-dim 4 --latent 9 --freqfold 1", "--freqfold=1 has to divide head_dim / 2 = 4 and be a mul"),
        ("--to mla --rope-dim 4 --latent 9 --freqfold 8", "use one of 2, 4"),
        ("--to mla --exact --latent 9", "--exact keeps everything: --latent and --rope-dim are both num_kv_heads"),
        ("--to gqe --alpha 2", "--alpha=2.0 must lie in (0, 1]"),
        ("--to gqe --step 3", "3"),
        ("--to gqe --data nowhere", "nowhere"),
        ("--to gqe --out DENSE", "exists and is not an empty folder"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_a_sentence(place, capsys, options, said):
    before = sorted(place.iterdir())
    options = options.replace("DENSE", str(place / "dense")).split()
    assert convert(place, "refused", *options) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("gqe convert: ")
    assert sorted(place.iterdir()) == before
