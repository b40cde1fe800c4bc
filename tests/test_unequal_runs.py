"""Runs whose KV heads serve unequal numbers of query heads: made, trained, resumed, sampled, exported, read back."""

import re
import shutil

import numpy as np
import pytest
import tiny_run
from converted import logits, read_run, tokens, write_run

from gqe_jax.attention import GQAConfig
from gqe_jax.cli import main as cli
from gqe_jax.config_files import load_config
from gqe_jax.pytorch.exporting import export_hf
from gqe_jax.pytorch.importing import import_folder
from gqe_jax.runs.load import load_model
from gqe_jax.runs.metrics import read_metrics
from gqe_jax.runs.saved_model import open_model

SHORT = ["train.steps=4", "train.checkpoint_every=2", "train.log_every=1", "train.eval_every=0", "data.batch_size=2",
         "optimizer.warmup_steps=1", "optimizer.decay_steps=1"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with prepared rows and `dense`, an MHA of five heads with random weights."""
    directory = tmp_path_factory.mktemp("unequal")
    with tiny_run.quick_compiles(tmp_path_factory.mktemp("cache")):
        tiny_run.prepare_tiny(directory / "data")
        heads = GQAConfig(num_query_heads=5, num_kv_heads=5, head_dim=8, implementation="reference")
        write_run(directory / "dense", heads, context=tiny_run.CONTEXT)
        yield directory


def gqe(line, place):
    return cli.main([str(place / word[1:]) if word.startswith("@") else word for word in line.split()])


def train(place, config, run, *settings):
    settings = [f"data.path={place / 'data'}", *SHORT, *settings]
    options = [f"--config.{setting}" for setting in settings]
    assert cli.main(["train", "--config", str(place / config), "--run", str(place / run), *options]) == 0


def resumed(place, run, config):
    """Hashes of the last state of a run that lost its last checkpoint and was trained to the end again."""
    shutil.copytree(place / run, place / f"{run}_resumed")
    shutil.rmtree(place / f"{run}_resumed/checkpoints/4")
    train(place, config, f"{run}_resumed")
    return tiny_run.leaf_hashes(place / f"{run}_resumed", 4)


def assert_exports(place, run):
    """PyTorch computes the run's logits, and what it was written from comes back to the bit."""
    torch = pytest.importorskip("torch")
    import torch_folder

    assert "GQEForCausalLM" in export_hf(open_model(place / run), place / f"{run}_exported")
    ids = tokens(259)
    with torch.no_grad():
        wanted = torch_folder.load(place / f"{run}_exported").eval()(torch.tensor(ids).long()).logits.numpy()
    np.testing.assert_allclose(logits(load_model(place / run).model, ids), wanted, atol=2e-4)
    config = import_folder(place / f"{run}_exported", place / f"{run}_back")
    back, there = read_run(place / f"{run}_back"), read_run(place / run)
    assert config.model.attention.kind == open_model(place / run).config.model.attention.kind
    assert back.keys() == there.keys() and all(np.array_equal(back[path], there[path]) for path in there)


def test_unequal_groups_are_made_trained_resumed_and_exported(place, capsys):
    """Every layer's sizes and costs are printed; the mask stays as it was made, and so do the padded places, for their
    gradient is 0 and they started at 0; a resumed run has the same bits, its buffers too."""
    options = "--to asym_gqa --num-kv-heads 2 --calibration-rows 8 --heldout-rows 16 --data @data --out @asym"
    assert gqe(f"convert --run @dense {options}", place) == 0
    out = capsys.readouterr().out
    layers = re.findall(r"groups of ([\d ]+) query heads; J: neighbours ([\d.]+), unequal ([\d.]+)", out)
    assert len(layers) == 2
    for sizes, before, after in layers:
        assert sum(map(int, sizes.split())) == 5 and float(after) <= float(before)
    most = max(int(size) for sizes, *_ in layers for size in sizes.split())
    assert f"asym_gqa (num_query_heads 5, num_kv_heads 2, head_dim 8, groups of up to {most})" in out
    assert load_config(str(place / "asym/config.py")).model.attention.max_group_size == most

    shutil.copytree(place / "asym", place / "asym_on")
    train(place, "asym/config.py", "asym_on")
    assert resumed(place, "asym_on", "asym/config.py") == tiny_run.leaf_hashes(place / "asym_on", 4)
    arrays, before = read_run(place / "asym_on"), read_run(place / "asym")
    mask = before["layers.attention.head_mask"]
    assert mask.dtype == bool and (mask.sum(axis=(1, 2)) == 5).all()
    np.testing.assert_array_equal(arrays["layers.attention.head_mask"], mask)
    kernel = arrays["layers.attention.o_proj.kernel"]
    assert not kernel[~mask].any() and (kernel != before["layers.attention.o_proj.kernel"])[mask].any()
    assert gqe("generate --run @asym_on --prompt the --max-new-tokens 3 --temperature 0", place) == 0
    assert_exports(place, "asym_on")


def test_equal_groups_are_a_plain_gqa(place, capsys):
    """One group of all heads is the same for every search: MQA, through the same command."""
    options = "--to asym_gqa --equal --num-kv-heads 1 --calibration-rows 8 --heldout-rows 16 --data @data --out @mqa"
    assert gqe(f"convert --run @dense {options}", place) == 0
    out = capsys.readouterr().out
    assert "groups of 5 query heads; J: neighbours" in out and "gqa (num_query_heads 5, num_kv_heads 1" in out
    plain = options.replace("asym_gqa --equal", "gqa").replace("@mqa", "@plain")
    assert gqe(f"convert --run @dense {plain}", place) == 0
    one, other = read_run(place / "mqa"), read_run(place / "plain")
    assert all(np.array_equal(one[path], other[path]) for path in other)


def test_key_driven_runs_allocate_resume_freeze_and_export(place, capsys):
    """A dense run goes on as key-driven: its first step is the dense function, then runs follow the norms, as metrics
    and `inspect run` say; evaluation leaves them; a resumed run has the same bits; frozen it is the same model."""
    write_run(place / "gqa", GQAConfig(num_query_heads=6, num_kv_heads=2, head_dim=8, implementation="reference"),
              context=tiny_run.CONTEXT)  # fmt: skip
    options = "--to key_driven --calibration-rows 8 --heldout-rows 16 --data @data --out @driven"
    assert gqe(f"convert --run @gqa {options}", place) == 0
    ids = tokens(259)
    models = [load_model(place / name).model for name in ("gqa", "driven")]
    np.testing.assert_allclose(logits(models[1], ids), logits(models[0], ids), atol=1e-5)
    train(place, "driven/config.py", "driven")
    assert resumed(place, "driven", "driven/config.py") == tiny_run.leaf_hashes(place / "driven", 4)
    arrays = read_run(place / "driven")
    heads = arrays["layers.attention.heads"]
    assert heads.dtype == np.int32 and (heads.sum(axis=1) == 6).all() and not (heads == 3).all()
    assert (arrays["layers.attention.steps"] == 4).all() and (arrays["layers.attention.key_norm"] > 0).all()
    logged = [line["heads"] for line in read_metrics(place / "driven") if "heads" in line]
    assert logged[0] == [[3, 3], [3, 3]] and logged[-1] != logged[0]

    capsys.readouterr()
    assert gqe("inspect run --run @driven", place) == 0
    table = capsys.readouterr().out.split("query heads on each KV head\n")[1].splitlines()
    assert table[0].split() == ["step", "1", "step", "2", "step", "3", "step", "4"]
    counts = [" ".join(f"{count:g}" for count in step[0]) for step in logged]
    assert re.split(" {3,}", table[1]) == ["layer 0", *counts]

    assert gqe("eval --run @driven --data @data", place) == 0
    assert gqe("generate --run @driven --prompt the --max-new-tokens 3 --temperature 0", place) == 0
    assert all(np.array_equal(read_run(place / "driven")[path], x) for path, x in arrays.items())
    assert gqe("convert --run @driven --to asym_gqa --heldout-rows 16 --calibration-rows 8 --out @frozen", place) == 0
    groups = re.findall(r"groups of ([\d ]+) query heads", capsys.readouterr().out)
    assert groups == [" ".join(map(str, layer)) for layer in heads]
    frozen = logits(load_model(place / "frozen").model, ids)
    np.testing.assert_allclose(frozen, logits(load_model(place / "driven").model, ids), atol=1e-5)
    assert_exports(place, "driven")
