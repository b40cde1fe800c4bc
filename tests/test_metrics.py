"""The metrics file is the record of one run through kills and resumes; the terminal says what it should."""

import json
import math
import struct
import sys
import types

import numpy as np
import pytest
from test_data_bucket import bucket  # noqa: F401

from gqe_jax.attention.balance import balance, router_warnings
from gqe_jax.config import ConfigError
from gqe_jax.runs.metrics import (
    MetricWriter,
    Stopwatch,
    format_duration,
    progress_line,
    read_metrics,
)


def write(directory, steps, **options):
    with MetricWriter(directory, config={}, **options) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / step})


# ---------------------------------------------------------------- metrics.jsonl


def test_one_json_object_per_line(tmp_path):
    """What any JSON reader understands: device scalars as numbers, load as nested lists, NaN (not JSON) as null."""
    load = np.arange(4, dtype=np.float32).reshape(1, 2, 2)
    with MetricWriter(tmp_path / "new" / "run", config={}) as writer:
        writer.write(3, {"loss": np.float32(0.5), "count": np.int32(7), "load": load, "norm": math.nan, "note": "x"})
        # Given to the operating system at once: readable while the run goes on, and after a kill.
        (line,) = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
    expected = {"step": 3, "loss": 0.5, "count": 7, "load": [[[0, 1], [2, 3]]], "norm": None, "note": "x"}
    assert json.loads(line, parse_constant=pytest.fail) == expected
    assert next(iter(json.loads(line))) == "step"


def test_resume_drops_what_will_be_written_again(tmp_path):
    """A run killed at step 5 that resumes from step 3 takes steps 4 and 5 twice, but leaves one record of each."""
    write(tmp_path, [1, 2, 3, 4, 5])
    write(tmp_path, [4, 5, 6], resume_step=3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    write(tmp_path, [1])  # from the start: another run's lines would mix with this one's
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


@pytest.mark.usefixtures("bucket")
def test_run_in_a_bucket():
    """An object cannot grow: it is replaced before each checkpoint and at the end; a resumed run goes on with it."""
    with MetricWriter("gs://bucket/run", config={}) as writer:
        writer.write(1, {"loss": 1.0})
        writer.upload()
        writer.write(2, {"loss": 0.5})
        assert [line["step"] for line in read_metrics("gs://bucket/run")] == [1]
    assert [line["step"] for line in read_metrics("gs://bucket/run")] == [1, 2]
    write("gs://bucket/run", [2, 3], resume_step=1)
    assert [line["step"] for line in read_metrics("gs://bucket/run")] == [1, 2, 3]


@pytest.mark.parametrize("cut", [1, 5, 15])
def test_half_written_last_line(tmp_path, cut):
    """kill -9 may cut the last line anywhere, the line end included: reading and resuming do without that line."""
    write(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, [3, 4], resume_step=3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert path.read_bytes().endswith(b"\n")


def test_foreign_file_is_not_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("not json\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 1, is not a JSON object with a step"):
        write(tmp_path, [1])
    assert (tmp_path / "metrics.jsonl").read_text() == "not json\n"


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []


# ---------------------------------------------------------------- extras


@pytest.mark.parametrize(("extra", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_missing_extra_is_named(tmp_path, monkeypatch, extra, package):
    """Found out before anything is written, with the command that mends it."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as error:
        MetricWriter(tmp_path / "run", config={}, **{extra: True})
    message = str(error.value)
    assert f"train.{extra}=True" in message and f"pip install 'gqe_jax[{extra}]'" in message and package in message
    assert not (tmp_path / "run").exists()


def test_tensorboard_files_hold_the_numbers(tmp_path):
    """Read back without tensorboardX: TFRecords of Event protos carry the tag as text and the value as a float32."""
    pytest.importorskip("tensorboardX")
    with MetricWriter(tmp_path, tensorboard=True, config={}) as writer:
        writer.write(3, {"loss": 0.123, "load": [1.0, 2.0], "norm": math.inf})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    content = path.read_bytes()
    assert b"loss" in content and struct.pack("<f", 0.123) in content
    assert b"load" not in content and b"norm" not in content


def test_wandb_goes_on_in_the_same_chart(tmp_path, monkeypatch):
    """A resumed run must not start a second chart, and two runs in directories of one name must not share one."""
    calls, logged = [], []

    class Run:
        def log(self, metrics, step):
            logged.append((step, metrics))

        def finish(self):
            logged.append("finished")

    def init(**arguments):
        calls.append(arguments)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for directory in (tmp_path / "a" / "run", tmp_path / "a" / "run", tmp_path / "b" / "run"):
        with MetricWriter(directory, wandb=True, config={"x": 1}) as writer:
            writer.write(1, {"loss": np.float32(0.5), "load": [1.0]})
    first, again, other = calls
    assert first["id"] == again["id"] != other["id"]
    assert first["resume"] == "allow" and first["config"] == {"x": 1} and first["name"] == "run"
    assert logged == [(1, {"loss": 0.5}), "finished"] * 3


# ---------------------------------------------------------------- the terminal


def line(step, loss=3.25, bits_per_byte=1.5, note="router max/mean  1.25", mfu=None, **changes):
    numbers = {"learning_rate": 5e-4, "gradient_norm": 0.75, "tokens_per_second": 12345.6, "seconds_left": 3723}
    fixed = {"loss": loss, "bits_per_byte": bits_per_byte, "note": note, "mfu": mfu}
    return progress_line(step, 1000, **fixed, **numbers | changes)


def test_progress_line():
    assert line(20) == (
        "step   20/1000  loss  3.2500  bits/byte 1.5000  lr 5.0e-04  grad     0.75     12,346 tok/s   1h02m left  "
        "router max/mean  1.25"
    )
    assert "router" not in line(20, note=None)
    assert line(20, mfu=0.4321).endswith("  mfu  43.2%")
    assert "bits/byte      -" in line(20, bits_per_byte=None)


def test_progress_lines_stand_under_each_other():
    """Columns must not move while numbers grow and shrink over a run, nor for NaN."""
    lines = [
        line(1, loss=11.1, seconds_left=8e6, gradient_norm=1234567.0, tokens_per_second=1e6),
        line(1000, loss=math.nan, seconds_left=0, gradient_norm=1e-9, learning_rate=0.0, tokens_per_second=9.0),
        line(20, bits_per_byte=None, seconds_left=86400 * 99),
    ]
    assert len({len(text) for text in lines}) == 1 and not any("\r" in text for text in lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (86400 * 12 + 3 * 3600, "12d03h")],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_stopwatch():
    """Rate of the last piece, time left by the mean of all: 10 steps in 5 s, then 10 in 15 s; 30 left at 1 s each."""
    stopwatch = Stopwatch()
    assert stopwatch.lap(10, 1000, 5.0, 40) == (200.0, 20.0)
    assert stopwatch.lap(10, 1000, 15.0, 30) == (pytest.approx(1000 / 15), 30.0)


# ---------------------------------------------------------------- router balance


def test_balance_is_that_of_the_worst_group():
    load = np.full((3, 2, 4), 0.5)  # k = 2 of M = 4
    assert balance(load) == 1.0
    load[1, 1] = [1.0, 0.5, 0.25, 0.25]
    assert balance(load) == 2.0


def test_router_warnings_name_layer_group_and_experts():
    load = np.full((3, 2, 4), 0.25)
    load[1, 0] = [0.999, 0.001, 0.0, 0.0]  # dead below 1% of the uniform 25%: 0.25%
    load[2, 1] = [0.96, 0.03, 0.0075, 0.0025]
    assert router_warnings(load, 1) == [
        "router of layer 1, group 0: dead: expert 1 (0.1%), expert 2 (0.0%), expert 3 (0.0%); overloaded: expert 0 "
        "(99.9%); uniform: 25.0%",
        "router of layer 2, group 1: overloaded: expert 0 (96.0%); uniform: 25.0%",
        "usual in the first steps, while the learning rate rises; if it lasts, raise "
        "model.attention.router.load_balance_weight or init_std",
    ]


def test_router_that_is_well_says_nothing():
    """Also where every expert is selected for every token by definition: k = M, and M = 1."""
    assert router_warnings(np.full((2, 2, 2), 0.5), 1) == []
    assert router_warnings(np.full((2, 2, 2), 1.0), 2) == []
    assert router_warnings(np.ones((2, 2, 1)), 1) == []


def test_collapsed_router_makes_few_lines():
    """All groups collapsed must not fill the screen: four of them, then how many more and what to do."""
    load = np.zeros((24, 8, 2))
    load[..., 0] = 1.0
    lines = router_warnings(load, 1)
    assert len(lines) == 5
    assert lines[-1].startswith("and 188 more groups; usual in the first steps, ")
