"""The tables of `gqe bench attention` on accelerators: what is counted, how it is shown, what is refused."""

import csv
import dataclasses

import numpy as np
import pytest

from gqe_jax.aot.bundles import Block
from gqe_jax.aot.tpu_compile import Compiled, CompileError, Kernel, compile_all, compile_for
from gqe_jax.bench import static, table
from gqe_jax.bench.rivals import RIVALS, Setting, flops, useful_cycles
from gqe_jax.bench.table import Cell
from gqe_jax.cli.main import main

DENSE, OTHER, OURS = RIVALS["tpu"]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("rival", [DENSE, OURS])
def test_flops_are_those_of_the_pairs_in_the_mask(rival, backward):
    """2·D for each True of the causal mask, head and matrix product: 2 forward, 5 more backward."""
    s = Setting(37, head_dim=24)
    heads = {"gqa": 16, "gqe": 8 + 1}[rival.kind]
    assert flops(rival, s, backward) == 2 * 24 * np.tril(np.ones((37, 37))).sum() * heads * (7 if backward else 2)


@pytest.mark.parametrize(
    ("target", "head_dim", "cycles"),
    [("v5e", 128, 2048), ("v5e", 64, 2048), ("v5e", 256, 4096), ("v6e", 128, 1024), ("v6e", 256, 1024)],
)
def test_useful_cycles_of_a_tile(target, head_dim, cycles):
    """512 · 1024 pairs take what the compiler's schedules show that their matmuls take, at every width of a unit."""
    s = Setting(8192, head_dim)
    tiles = (8192 * 8193 / 2) / (512 * 1024)
    assert useful_cycles(DENSE, s, False, target) == pytest.approx(16 * tiles * cycles)


def cells(cost=lambda rival, seq_len: 1.0):
    return [
        Cell(part, backward, rival.name, seq_len, cost(rival, seq_len), "cycles", 10**9, 0.5)
        for part in table.PARTS
        for backward in table.PASSES
        for rival in RIVALS["tpu"]
        for seq_len in (2048, 8192)
    ]


def test_speed_up_is_that_of_ours_over_dense():
    some = cells(lambda rival, seq_len: 1.8e6 if rival is DENSE else 1e6 if rival is OURS else 7e6)
    assert table.speed_up(some, "layer", True, RIVALS["tpu"], 8192) == pytest.approx(1.8)
    lines = table.text(some, RIVALS["tpu"], "attention", False).splitlines()
    assert lines[2].split() == ["2048", "1,800.0", "7,000.0", "1,000.0", "1.80", "1", "50%", "50%"]


def test_what_has_no_cost_leaves_a_gap():
    some = cells(lambda rival, seq_len: None if rival is OURS else 1.0)
    assert table.speed_up(some, "layer", True, RIVALS["tpu"], 8192) is None
    assert table.text(some, RIVALS["tpu"], "layer", False).splitlines()[2].split() == ["2048", "0.0", "0.0", "-", "-"]


def test_csv_and_plot(tmp_path):
    table.write_csv(tmp_path / "x.csv", cells(), {"device": "v6e", "how": "static", "head_dim": 128})
    with open(tmp_path / "x.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(cells())
    assert [rows[0][name] for name in ("device", "how", "rival", "cost")] == ["v6e", "static", DENSE.name, "1.0"]
    table.plot(tmp_path / "x.png", cells(), RIVALS["tpu"], 16 / 9, "v6e")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("unit, measure", [("cycles", "modelled cycles"), ("ms", "measured time")])
def test_the_plot_says_what_was_measured(tmp_path, monkeypatch, unit, measure):
    """A figure is shown without the text around it: a model's cycles may not pass for a clock's time. From 0 on, the
    height of a point is the ratio."""
    figures = pytest.importorskip("matplotlib.figure")
    saved = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    some = [dataclasses.replace(cell, unit=unit) for cell in cells()]
    table.plot(tmp_path / "x.png", some, RIVALS["tpu"], 16 / 9, "v6e")
    (axes,) = saved[0].axes
    assert axes.get_ylabel() == f"speed-up over {DENSE.name}, {measure}" and axes.get_ylim()[0] == 0


def test_a_comparison_is_put_together_from_its_compiles(monkeypatch, capsys):
    """Dense attention's kernels are counted once for each of its heads, ours with ours, a layer's with its attention:
    nothing else asks for schedules, which are slow to write. What is done is said as it is."""
    kernel_cycles = {DENSE.name: 1600, OURS.name: 700}

    def compile_nothing(jobs, on_result):
        results = []
        for n, job in enumerate(jobs):
            block = Block("0", 1, 1, 0, 0, 0, visits=kernel_cycles.get(job.options["rival"]["name"], 0))
            assert job.schedules == (
                job.options["part"] == "attention" and job.options["rival"]["name"] in kernel_cycles
            )
            xla = (("fusion", 30 if job.options["part"] == "layer" else 5),)
            results.append(Compiled("0.0", 0, 0, 0, "", (Kernel("k", (block,)),) if job.schedules else (), xla))
            on_result(n, results[-1], 1.0)
        return results

    monkeypatch.setattr(static, "compile_all", compile_nothing)
    result = static.measure("v5e", (2048,), 128)
    cost = {(c.part, c.rival): c.cost for c in result.cells if not c.backward}
    assert cost["attention", DENSE.name] == 1605 and cost["layer", DENSE.name] == 1630
    assert cost["attention", OTHER.name] == 905 and cost["layer", OTHER.name] == 930
    assert cost["attention", OURS.name] == 705 and cost["layer", OURS.name] == 730
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12 and lines[0] == "compiled 1 of 12: attention alone, forward, GQA, splash, S = 2048 (1 s)"


def test_quantities_of_a_known_kernel():
    """From hand-made blocks: tiles by their masks, the prologue by its place and matmul; totals by visits."""
    step = Block("0", 10, 10, 0, 0, 0, visits=100)
    row = Block("1", 50, 50, 16, 0, 0, visits=20)
    whole, masked = Block("2", 900, 950, 800, 0, 0, visits=60), Block("3", 990, 999, 800, 0, 512, visits=20)
    start = Block("4", 5, 5, 0, 0, 0, visits=1)
    kernel = Kernel("gqe_forward.1", (start, step, row, masked, whole))
    assert kernel.tiles == (whole, masked)
    assert kernel.prologues == (row,)
    assert kernel.total == 5 + 1000 + 1000 + 990 * 20 + 900 * 60
    compiled = Compiled("0.0", 0, 0, 0, "", (kernel,), (("copy", 7),))
    assert compiled.total == kernel.total + 7
    result = static.Static("v5e", 128, {("attention", False, OURS.name, 8192): compiled}, tuple(cells()))
    found = static.quantities(result)
    assert found["forward, unmasked tile: matrix-unit cycles over bound"] == pytest.approx(800 / 900)
    assert found["forward, masked tile over unmasked"] == pytest.approx(1.1)
    assert found["selection, rotary, norm of q over forward, S = 8192"] == pytest.approx(1000 / kernel.total)
    assert "missed" in static.report(result)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--target", "v9"], "--target v9 is unknown: use one of v4, v5e, v5p, v6e, tpu7x"),
        (["--target", "v6e", "--heads", "8"], "--heads is for CPUs: on a TPU it is 16 query heads in 8 groups"),
        (["--plot", "x.png"], "--plot is for TPUs and GPUs: name a TPU with --target"),
        (["--target", "v6e", "--seq-len", "0"], "--seq-len=0 must be at least 1"),
    ],
)
def test_flags_that_fit_nothing_are_refused(argv, message, capsys):
    assert main(["bench", "attention", *argv]) != 0
    assert message in capsys.readouterr().err


def test_unknown_targets_are_refused():
    with pytest.raises(CompileError, match="target 'v9' is unknown: choose one of v4, v5e, v5p, v6e, tpu7x"):
        compile_for("v9", "gqe_jax.bench.rivals:make")
    assert compile_all([]) == []
