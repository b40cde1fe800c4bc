"""`gqe inspect run` on directories written here by hand."""

import argparse
import builtins
import dataclasses
import json

import numpy as np
import pytest

from gqe_jax.attention import GQAConfig, GQEConfig
from gqe_jax.cli import inspect as inspect_cli
from gqe_jax.config import ConfigError, ModelConfig, RunConfig
from gqe_jax.config_dict import to_dict
from gqe_jax.evaluate.run_report import plot_text, report, write_png
from gqe_jax.runs.record import read_run


def make_run(directory, attention=None, steps=(1, 10, 20), extra=b""):
    attention = attention or GQEConfig(num_query_experts=4, num_kv_heads=2, head_dim=8)
    model = ModelConfig(vocab_size=259, d_model=32, num_layers=2, d_ff=48, context=64, attention=attention)
    (directory / "config.json").write_text(json.dumps(to_dict(RunConfig(name="tiny", model=model))))
    lines = []
    for step in steps:
        line = {"step": step, "loss": 5.5 - step / 10, "bits_per_byte": 8 - step / 10, "mfu": None}
        if isinstance(attention, GQEConfig):
            line |= {"load": [[[0.5, 0.5], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]], "entropy": [0.69, 0.1]}
        lines.append(line)
    if steps:
        lines.append({"step": steps[-1], "eval/loss": 3.25, "eval/bits_per_byte": 4.7, "eval/load": None})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_bytes(text.encode() + extra)
    return directory


def run_command(*options):
    parser = argparse.ArgumentParser()
    inspect_cli.add_arguments(parser)
    return inspect_cli.run(parser.parse_args(["run", *options]))


def test_report_of_a_gqe_run(tmp_path, capsys):
    """Everything the summary promises is in it, with numbers computed here by hand."""
    assert run_command("--run", str(make_run(tmp_path))) == 0
    out = capsys.readouterr().out
    assert "2 layers, d_model 32, d_ff 48, vocabulary 259, context 64" in out
    assert "gqe: num_query_experts 4, num_kv_heads 2, head_dim 8, top_k 1 of 2, gqe, router learned" in out
    # embedding 259·32; per layer W_q, W_k, W_v, W_s, W_o of (4+2+2+1+4)·8 columns, 3 SwiGLU matrices, router; norms
    total = 259 * 32 + 2 * (32 * 8 * 13 + 3 * 32 * 48 + 32 * 4) + 5 * 32
    assert f"parameters       {total:,} (embedding 8,288, attention 6,656, mlp 9,216, norm 160, router 256)" in out
    assert "last step        step 20, loss 3.5, bits_per_byte 6" in out
    assert "last evaluation  step 20, loss 3.25, bits_per_byte 4.7" in out
    assert "layer 0: max/mean 1.50, entropy 0.690 of 0.693 nats" in out
    assert "layer 1: max/mean 2.00, entropy 0.100 of 0.693 nats" in out
    assert f"  group 0  100.0% {'#' * 20}    0.0%\n" in out
    assert f"  group 1   25.0% {'#' * 5:<20}   75.0% {'#' * 15}\n" in out
    assert "mfu" not in out and "nan" not in out


def test_report_of_a_dense_run(tmp_path):
    """Dense attention has no experts to report."""
    text = report(read_run(make_run(tmp_path, GQAConfig(num_query_heads=4, num_kv_heads=2, head_dim=8))))
    assert "gqa: num_query_heads 4" in text and "expert load" not in text and "router" not in text


def test_run_without_metrics(tmp_path, capsys):
    """A run that was killed before its first logged step is still a run."""
    make_run(tmp_path, steps=())
    (tmp_path / "metrics.jsonl").unlink()
    run_command("--run", str(tmp_path))
    assert "no step was logged yet" in capsys.readouterr().out


def test_half_written_last_line_is_left_out(tmp_path):
    """A kill may cut the last line short: it has no line end."""
    record = read_run(make_run(tmp_path, extra=b'{"step": 30, "lo'))
    assert record.metrics[-1]["step"] == 20


def test_loss_curve():
    """A straight line falls from the upper left to the lower right corner, and its ends are labelled."""
    lines = plot_text(np.arange(0, 101), np.linspace(4.0, 2.0, 101), width=20, height=5).splitlines()
    rows = [line[11:] for line in lines[:5]]
    columns = [next(i for i, row in enumerate(rows) if row[column : column + 1] == "*") for column in range(20)]
    assert columns == sorted(columns) and columns[0] == 0 and columns[-1] == 4
    assert lines[5] == " " * 10 + "+" + "-" * 20
    assert lines[6].split() == ["0", "100"]
    assert 3.9 < float(lines[0].split()[0]) <= 4.0 and 2.0 <= float(lines[4].split()[0]) < 2.1


@pytest.mark.parametrize("points", [([7], [2.5]), ([1, 2, 3], [2.5, 2.5, 2.5]), ([], [])])
def test_loss_curve_of_few_or_equal_points(points):
    """One point, or a constant, has no range to divide by."""
    text = plot_text(*map(np.asarray, points), width=10, height=4)
    assert text == "(no finite values)" if not points[0] else text.splitlines()[0].startswith("   2.5000 |*")


def test_png(tmp_path, capsys):
    """The picture is a PNG file, for GQE twice as wide as the loss curve alone."""
    pytest.importorskip("matplotlib")
    widths = []
    for attention in (None, GQAConfig(num_query_heads=4, num_kv_heads=2, head_dim=8)):
        path = tmp_path / "run.png"
        run_command("--run", str(make_run(tmp_path, attention)), "--png", str(path))
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        widths.append(int.from_bytes(data[16:20], "big"))
    assert widths == [1440, 840]
    with pytest.raises(ConfigError, match=r"--png='.*' cannot be written \(No such file or directory\): choose"):
        run_command("--run", str(tmp_path), "--png", str(tmp_path / "absent" / "run.png"))


@pytest.mark.parametrize(
    "groups, experts, numbers", [(2, 4, ["0", "1", "2", "3"] * 2), (8, 8, []), (32, 2, [])]
)
def test_heat_map_names_experts_and_the_uniform_share(tmp_path, monkeypatch, groups, experts, numbers):
    """Colours are read against the share that every expert would have if all had the same; columns by their numbers,
    those of the groups alone where there are many."""
    figures = pytest.importorskip("matplotlib.figure")
    saved = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    load = np.full((3, groups, experts), 1 / experts)
    run = dataclasses.replace(read_run(make_run(tmp_path)), metrics=[{"step": 1, "loss": 2.0, "load": load.tolist()}])
    write_png(run, tmp_path / "x.png")
    _, heat_map, bar = saved[0].axes
    assert [label.get_text() for label in heat_map.get_xticklabels(minor=True)] == numbers
    shown = [label.get_text().strip() for label in heat_map.get_xticklabels()]
    assert shown[:2] == ["0", "2" if groups == 32 else "1"] and len(shown) <= 24
    assert f"uniform: {1 / experts:.1%}" in [label.get_text() for label in bar.get_yticklabels()]


def test_png_without_matplotlib(tmp_path, monkeypatch):
    """matplotlib is an extra: without it the message says what to install."""
    original = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ConfigError, match=r"needs matplotlib, which is not installed .*: pip install 'gqe_jax\[viz\]'"):
        run_command("--run", str(make_run(tmp_path)), "--png", str(tmp_path / "run.png"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"--run='.*' has no config.json, so no run was started there: give the directory that `gqe train"),
        ("{", r"has a config.json that is not one of a run \(Expecting property name.*\): give the directory that"),
        ("5", r"has a config.json that is not one of a run"),
        ('{"name": "a", "modle": {}}', r"not one of a run \(unknown config key 'modle': did you mean 'model'\?\)"),
    ],
)
def test_foreign_directories(tmp_path, config, message):
    """A directory that is none of a run is refused with what to give instead."""
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        run_command("--run", str(tmp_path))


def test_missing_directory(tmp_path):
    """A mistyped path is named."""
    with pytest.raises(ConfigError, match=r"--run='.*absent' is not a directory: give the one that `gqe train --run`"):
        run_command("--run", str(tmp_path / "absent"))


@pytest.mark.parametrize("line", [b"{broken\n", b'{"loss": 1}\n', b"[1]\n"])
def test_damaged_metrics(tmp_path, line):
    """A whole line that cannot be read is damage, not a kill: it is named by file and number."""
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 5, is not a JSON object with a step .*: repair"):
        read_run(make_run(tmp_path, extra=line))
