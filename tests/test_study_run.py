"""Cells on disk: their records, the tables and plots that are made of them, and a study that is killed and goes on."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_run import QUICK_FLAGS, prepare_tiny, write_config

import gqe_jax
from gqe_jax.cli.main import main
from gqe_jax.processes.place import Place
from gqe_jax.runs.metrics import read_metrics
from gqe_jax.study import records, running
from gqe_jax.study.definition import cells, read_study

STUDY = """
reference = "gqe"
tokens = 20_480
seeds = [0, 1, 2]
[arms.gqe]
config = "gqe_250m:laptop"
[arms.fixed]
config = "gqe_250m:laptop,router=fixed"
[arms.gqa]
config = "gqa_250m:laptop"
"""
LOSSES = {"gqe": [1.30, 1.34, 1.32], "fixed": [1.301, 1.339, 1.321], "gqa": [1.25, 1.291, 1.269]}


@pytest.fixture
def study(tmp_path):
    """(study file, folder of its finished cells), written without training."""
    path, out = tmp_path / "mine.toml", tmp_path / "out"
    path.write_text(STUDY)
    definition = read_study(str(path))
    for cell in cells(definition):
        loss = LOSSES[cell.arm][cell.seed]
        load = None if cell.arm == "gqa" else np.full((4, 8, 2), 0.5).tolist()
        result = {
            "loss": loss,
            "bits_per_byte": loss / math.log(2),
            "by_position": [[0, 0, loss + 1, 10.0], [1, 255, loss, 2550.0]],
            "tokens_per_second": 1000.0 + cell.seed,
            "training": [[2048, 5.0], [20480, loss]],
            "heldout": [[20480, loss]],
            "load": load,
        }
        record = records.started(definition, cell, "c0de", "da7a")
        records.write(out, dataclasses.replace(record, result=result))
    return str(path), out


def refused(capsys, *words):
    assert main(["study", *map(str, words)]) == 2
    return capsys.readouterr().err


def edit(out, name, **fields):
    """Changes fields of a record on disk."""
    path = out / "cells" / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_table(study, capsys):
    """Means, intervals and costs, in Markdown, CSV and JSON alike, recomputed here from the losses and by hand."""
    path, out = study
    assert main(["study", "table", path, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (out / "table.md").read_text() == printed
    rows = {row["arm"]: row for row in csv.DictReader(io.StringIO((out / "table.csv").read_text()))}
    plain = {row["arm"]: row for row in json.loads((out / "table.json").read_text())["arms"]}
    t = 4.302653  # of two degrees of freedom, at 97.5%
    for arm, losses in LOSSES.items():
        mean, half = np.mean(losses), t * np.std(losses, ddof=1) / math.sqrt(3)
        assert float(rows[arm]["loss"]) == pytest.approx(mean) == plain[arm]["loss"]["mean"]
        assert float(rows[arm]["loss_half_width"]) == pytest.approx(half, rel=1e-5)
        assert f"| {arm} | {mean:.4f} ± {half:.4f} | {mean / math.log(2):.4f} ±" in printed
        assert float(rows[arm]["loss_0_0"]) == pytest.approx(mean + 1)
        assert float(rows[arm]["tokens_per_second"]) == 1001
    gaps = np.subtract(LOSSES["gqa"], LOSSES["gqe"])
    assert float(rows["gqa"]["difference"]) == pytest.approx(gaps.mean())
    half = t * np.std(gaps, ddof=1) / math.sqrt(3)
    assert float(rows["gqa"]["difference_half_width"]) == pytest.approx(half, rel=1e-5)
    assert [plain[arm]["difference"] and plain[arm]["difference"]["resolved"] for arm in LOSSES] == [None, False, True]
    assert rows["gqe"]["difference"] == "" and rows["gqa"]["resolved"] == "True"
    pairs = 256 * 257 / 2  # causal; two products of 2 · D FLOPs for each, in 4 layers
    for arm, heads in (("gqe", 9), ("fixed", 9), ("gqa", 16)):
        assert float(rows[arm]["attention_flops"]) == pytest.approx(4 * heads * 4 * 16 * pairs / 256)
    assert "20,480 tokens a cell, seeds 0, 1, 2; code c0de, data da7a" in printed


def test_plots(study, capsys):
    """Three pictures large enough to print; load is drawn of arms that route alone, and no picture where none does."""
    path, out = study
    assert main(["study", "plot", path, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for name in ("losses", "differences", "load"):
        content = (out / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG") and int.from_bytes(content[16:20], "big") > 1000  # pixels across
        assert f"wrote {out / name}.png" in printed
    (out / "load.png").unlink()
    dense = out.parent / "mine.toml"
    dense.write_text(STUDY.replace('reference = "gqe"', 'reference = "gqa"'))
    assert main(["study", "plot", str(dense), "--out", str(out), "--arms", "gqa"]) == 0
    assert not (out / "load.png").exists()


def test_a_part_of_the_seeds(study, capsys):
    """--seeds makes a table of the cells that are there; one seed alone gives no interval."""
    path, out = study
    for arm in LOSSES:
        (out / "cells" / f"{arm}-2.json").unlink()
    err = refused(capsys, "table", path, "--out", out)
    assert "3 of 9 cells" in err and "gqe-2, fixed-2, gqa-2" in err and "--seeds" in err
    assert main(["study", "table", path, "--out", str(out), "--seeds", "0", "1"]) == 0
    assert "seeds 0, 1;" in capsys.readouterr().out
    assert "1 seed(s) give no interval: take at least two" in refused(capsys, "table", path, "--out", out, "--seeds", 1)


def test_cells_that_cannot_be_compared_are_refused(study, capsys):
    """Other code, other data, other settings within an arm: a table would mix what is not one study."""
    path, out = study
    edit(out, "gqe-1", code="beef")
    assert "different code (hashes beef, c0de)" in refused(capsys, "table", path, "--out", out)
    edit(out, "gqe-1", code="c0de", data="beef")
    assert "different data (hashes beef, da7a)" in refused(capsys, "table", path, "--out", out)
    config = json.loads((out / "cells" / "gqe-1.json").read_text())["config"]
    config["model"]["d_ff"] = 512
    edit(out, "gqe-1", data="da7a", config=config)
    assert "the cells of arm gqe in" in refused(capsys, "table", path, "--out", out)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"format": 2}, "format=2, which must be 1"),
        ({"seed": "1"}, "has seed='1', which must be a whole number"),
        ({"seed": 2}, "says that it is cell gqe-2"),
        ({"config": {"model": {"d_fff": 1}}}, "its config is none that this version reads"),
        ({"result": {"loss": 1.0}}, "result: lacks bits_per_byte"),
        ({"arm": "other"}, "says that it is cell other-1"),
        ({"more": 1}, "has the unknown 'more'"),
    ],
)
def test_a_damaged_record_is_named(study, capsys, fields, words):
    """Records travel; each field is checked before a figure is made of it."""
    path, out = study
    edit(out, "gqe-1", **fields)
    err = refused(capsys, "table", path, "--out", out)
    assert words in err and "gqe-1.json" in err and "delete the file" in err


def test_the_folder_of_another_study_is_refused(study, tmp_path, capsys):
    """Its cells have the other study's name; a folder with other files is none of a study."""
    path, out = study
    other = tmp_path / "other.toml"
    other.write_text(STUDY)
    for verb in ("table", "run"):
        assert "is the folder of another study, mine, not of other" in refused(capsys, verb, other, "--out", out)
    assert "holds files, but no study's cells/" in refused(capsys, "run", path, "--out", tmp_path)
    assert "is a file: name the folder of the study" in refused(capsys, "run", path, "--out", path)


def test_records_that_come_with_the_docs_are_read():
    """Later work adds to them: they are cells of the study file beside them, finished, of one code and one data."""
    evidence = Path(__file__).parents[1] / "docs" / "evidence"
    for file in evidence.glob("*.toml"):
        study = read_study(str(file))
        known = records.read_records(file.with_suffix(""), study)
        assert known and all(record.result is not None for record in known.values())
        assert len({(record.code, record.data) for record in known.values()}) == 1
        assert all(arm in study.arms and seed in study.seeds for arm, seed in known)


def test_cells_of_changed_code_data_or_settings_are_not_added_to(study, capsys, monkeypatch):
    """`run` starts no cell beside others that came from something else; it says how many, and what to do."""
    path, out = study
    monkeypatch.setattr(running, "data_hash", lambda planned: "da7a")
    before = sorted(out.rglob("*"))
    err = refused(capsys, "run", path, "--out", out)
    assert "9 cell(s)" in err and "trained with other code (hash c0de" in err and "another --out" in err
    monkeypatch.setattr(running, "code_hash", lambda: "c0de")
    monkeypatch.setattr(running, "data_hash", lambda planned: "beef")
    assert "trained with other data (hash da7a, now beef)" in refused(capsys, "run", path, "--out", out)
    monkeypatch.setattr(running, "data_hash", lambda planned: "da7a")
    err = refused(capsys, "run", path, "--out", out, "--config.model.d_ff=256")
    assert "gqa-1: model.d_ff was 384 and is now 256" in err and "delete these cells' records" in err
    assert sorted(out.rglob("*")) == before
    assert main(["study", "run", path, "--out", str(out)]) == 0  # all are finished: nothing is trained
    assert sorted(out.rglob("*")) == before
    (out / "cells" / "gqe-1.json").unlink()
    (out / "runs" / "gqe-1").mkdir(parents=True)
    err = refused(capsys, "run", path, "--out", out)
    assert "gqe-1 in" in err and "there is a run, but no record of the code" in err and "delete the run" in err


@pytest.mark.parametrize("process", [0, 1])
def test_on_a_pod_machine_0_keeps_the_records(study, monkeypatch, process):
    """All machines train each cell together, by the same commands; one writes what came of it."""
    path, out = study
    shutil.rmtree(out)
    started = []

    def start(cell, out, distributed):
        started.append(running._command(cell, out, distributed))
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])

    monkeypatch.setattr(running, "_start", start)
    monkeypatch.setattr(running, "data_hash", lambda planned: "da7a")
    monkeypatch.setattr(running, "find_place", lambda timeout: Place("127.0.0.1:1", 2, process))
    assert main(["study", "run", path, "--out", str(out), "--seeds", "1", "--distributed"]) == 1
    assert len(started) == 3 and all(command[-1] == "--distributed" for command in started)
    assert sorted(file.stem for file in out.glob("cells/*")) == ([] if process else ["fixed-1", "gqa-1", "gqe-1"])


def test_the_hash_is_of_all_that_training_imports():
    """Every module of gqe_jax that `gqe train` loads is hashed, the command line's and the configurations apart: a
    change of what a run computes cannot go unseen."""
    code = "import sys, gqe_jax.train.loop, gqe_jax.cli.train\n"
    code += "print(*[name for name in sys.modules if name.startswith('gqe_jax.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    package = Path(gqe_jax.__file__).parent
    unseen = set()
    for module in done.stdout.split():
        first = module.split(".")[1]
        unseen |= {first, f"{first}.py"} & records.NOT_TRAINING
    assert unseen <= {"cli", "configs"}
    assert all((package / name).exists() for name in records.NOT_TRAINING)


def test_the_hash_sees_every_change(tmp_path, monkeypatch):
    """One byte of a file of the package changes it, and so does a file that moves; one of `cli` does not."""
    (tmp_path / "study").mkdir()
    monkeypatch.setattr(records, "__file__", str(tmp_path / "study" / "records.py"))
    for name in ("train/loop.py", "linear.py", "cli/main.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a = 1\n")
    hashes = [records.code_hash()]
    (tmp_path / "cli/main.py").write_text("a = 2\n")
    assert records.code_hash() == hashes[0]
    (tmp_path / "train/loop.py").write_text("a = 2\n")
    hashes.append(records.code_hash())
    (tmp_path / "train/loop.py").rename(tmp_path / "train/step.py")
    hashes.append(records.code_hash())
    assert len(set(hashes)) == 3


def start(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "gqe_jax.cli", "study", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_FLAGS},
        cwd=Path(__file__).parents[1],
    )


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_study_is_killed_and_goes_on(tmp_path):
    """After kill -9 of the study its cell stops by itself and saves, the same command goes on with it and trains the
    other one; a third start trains nothing. The records hold what the runs' own files say."""
    prepare_tiny(tmp_path / "data", documents=30)
    config = write_config(tmp_path / "tiny.py", tmp_path / "data")
    path, out = tmp_path / "mine.toml", tmp_path / "out"
    path.write_text(f"""
        reference = "gqa"
        tokens = {300 * 2 * 64}
        seeds = [0, 1]
        overrides = ["train.checkpoint_every=1000", "train.compilation_cache={tmp_path}/compiled"]
        arms.gqa.config = "{config}:gqa"
        arms.gqe.config = "{config}"
    """)
    command = ["run", path, "--out", out, "--seeds", 0, "--config.data.skip_damaged=true"]
    first = start(*command)
    wait_for(lambda: read_metrics(out / "runs" / "gqa-0"))
    first.kill()
    first.communicate()
    log = out / "logs" / "gqa-0.log"
    wait_for(lambda: "its checkpoint is saved" in log.read_text())
    assert json.loads((out / "cells" / "gqa-0.json").read_text())["result"] is None
    second = start(*command)
    _, err = second.communicate(timeout=240)
    assert second.returncode == 0, err
    assert "2 of 2 cells done" in err and "resuming" in log.read_text()
    for arm in ("gqa", "gqe"):
        lines = [line for line in read_metrics(out / "runs" / f"{arm}-0") if "eval/loss" in line]
        record = json.loads((out / "cells" / f"{arm}-0.json").read_text())
        assert record["result"]["loss"] == pytest.approx(lines[-1]["eval/loss"], rel=1e-6)
        assert record["result"]["heldout"][-1][0] == 300 * 2 * 64
        assert (record["code"], record["config"]["train"]["seed"]) == (records.code_hash(), 0)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["study", *map(str, command)]) == 0
    assert "all 2 cells are done" in printed.getvalue()
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
