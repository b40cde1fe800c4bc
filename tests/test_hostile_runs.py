"""Run directories with missing, torn and foreign files: every verb that takes --run says so in a sentence."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny_config

from gqe_jax.cli.main import main
from gqe_jax.data.tokenizer import ByteTokenizer
from gqe_jax.models.transformer import abstract_model
from gqe_jax.parallel.rules import placed_variables
from gqe_jax.runs.metrics import MetricWriter
from gqe_jax.runs.new_run import save_run


def untrained(directory, *changes):
    """A run that nobody trained: zeros for parameters."""
    directory.mkdir(exist_ok=True)
    config, run = tiny_config(directory / "data", *changes), directory / "run"
    run.mkdir()
    variables = placed_variables(abstract_model(config.model)).items()
    values = {path.replace("/", "."): placed.variable.get_value() for path, placed in variables}
    zeros = {path: jnp.zeros(value.shape, value.dtype) for path, value in values.items()}
    save_run(run, config, ByteTokenizer(), zeros)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained run with two lines of metrics."""
    run = untrained(tmp_path_factory.mktemp("runs"))
    with MetricWriter(run, config={}) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": 5.0 - step, "load": np.full((2, 2, 2), 0.5), "entropy": [0.5, 0.5]})
    return run


def tear(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def into_folder(path):
    path.unlink()
    path.mkdir()


CHECKPOINT = "checkpoints/0"
SPOILT = {
    "nothing there": shutil.rmtree,
    "a file": lambda run: (shutil.rmtree(run), run.write_text("")),
    "no checkpoints": lambda run: shutil.rmtree(run / "checkpoints"),
    "checkpoints are a file": lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").write_text("")),
    "an empty checkpoint": lambda run: (shutil.rmtree(run / CHECKPOINT), (run / CHECKPOINT).mkdir()),
    "a checkpoint is a file": lambda run: (shutil.rmtree(run / CHECKPOINT), (run / CHECKPOINT).write_text("")),
    "no parameters": lambda run: shutil.rmtree(run / CHECKPOINT / "params"),
    "no configuration": lambda run: shutil.rmtree(run / CHECKPOINT / "config"),
    "no tokenizer": lambda run: shutil.rmtree(run / CHECKPOINT / "tokenizer"),
    "no record": lambda run: (run / CHECKPOINT / "integrity.json").unlink(),
    "a torn record": lambda run: tear(run / CHECKPOINT / "integrity.json"),
    "the record is a folder": lambda run: into_folder(run / CHECKPOINT / "integrity.json"),
    "a torn item": lambda run: tear(max((run / CHECKPOINT / "config").iterdir())),
}


@pytest.mark.parametrize("verb", ["eval", "generate", "export"])
@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_checkpoints(run, tmp_path, capsys, verb, how):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    SPOILT[how](copy)
    out = ["--out", str(tmp_path / "out")] if verb == "export" else []
    code = main([verb, "--run", str(copy), *out])
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith(f"gqe {verb}: ") and str(copy) in err
    assert not (tmp_path / "out").exists()


RECORDS = {
    "no configuration": lambda run: (run / "config.json").unlink(),
    "a torn configuration": lambda run: tear(run / "config.json"),
    "the configuration is a folder": lambda run: into_folder(run / "config.json"),
    "the metrics are a folder": lambda run: into_folder(run / "metrics.jsonl"),
}
RECORDS |= {
    f"the configuration is {text[:20]}": lambda run, text=text: (run / "config.json").write_text(text)
    for text in ("[]", "5", '{"model": []}', '{"model": {"attention": 5}}', "[" * 100_000, "1" * 5000)
}
RECORDS |= {
    f"a line is {text[:20]}": lambda run, text=text: (run / "metrics.jsonl").write_text(text + "\n")
    for text in (
        "[]",
        "5",
        "{}",
        '{"step": "1"}',
        '{"step": -1}',
        '{"step": 1e999}',
        '{"step": 1, "loss": "x"}',
        '{"step": 1, "loss": []}',
        '{"step": 1, "loss": 1e999}',
        '{"step": 1, "loss": {}}',
        '{"step": 1, "loss": 1.0, "load": [[0.5], [1]]}',
        '{"step": 1, "loss": 1.0, "load": [[[0.5], [1, 2]]]}',
        '{"step": 1, "loss": 1.0, "load": 5}',
        '{"step": 1, "mfu": ' + "9" * 4000 + "}",
        "[" * 100_000,
        "\x00",
    )
}


@pytest.mark.parametrize("how", RECORDS)
def test_spoilt_records(run, tmp_path, capsys, how):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    RECORDS[how](copy)
    code = main(["inspect", "run", "--run", str(copy)])
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("gqe inspect: ") and len(err) < 2000


def test_a_load_that_is_no_number_is_left_out(run, tmp_path, capsys):
    """NaN is null in the file: the report shows the last load that has none."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "load" in line][-1]
    (copy / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, last | {"step": 5, "load": [[[None, 1.0]]]}])
    )
    assert main(["inspect", "run", "--run", str(copy)]) == 0
    assert f"{len(last['load'])} layers" in capsys.readouterr().out


@pytest.mark.parametrize("name, needs", [("pallas_tpu", "a TPU"), ("cudnn", "an NVIDIA GPU")])
def test_a_model_of_another_platform_is_used_here(tmp_path, capsys, caplog, name, needs):
    """A run that names an implementation for TPUs or GPUs is used on a CPU, and a warning says what is done instead."""
    run = untrained(tmp_path / name, f"model.attention.implementation={name}")
    assert main(["generate", "--run", str(run), "--prompt", "x", "--max-new-tokens", "1"]) == 0
    said = f"implementation='{name}', which needs {needs}: here attention takes the fastest that runs"
    assert [said in record.getMessage() for record in caplog.records if record.name == "gqe_jax"] == [True]
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "out")]) == 0
