"""The tables of `gqe bench attention` on accelerators: what is counted, how it is shown, what is refused."""

import csv
import dataclasses
import importlib
import math

import jax
import numpy as np
import pytest

from gqe_jax.aot.bundles import Block
from gqe_jax.aot.operations import Operation, hbm_bytes, operations
from gqe_jax.aot.tpu_compile import Compiled, CompileError, Kernel, compile_all, compile_for
from gqe_jax.bench import rivals, static, table
from gqe_jax.bench.rivals import RIVALS, Setting, flops, useful_cycles
from gqe_jax.bench.table import Cell
from gqe_jax.cli.main import main
from gqe_jax.kernels import IMPLEMENTATIONS
from gqe_jax.kernels.choose import Choice
from gqe_jax.kernels.tpu import pallas_tpu as pallas_tpu_module

attend_module = importlib.import_module("gqe_jax.kernels.attend")
SPLASH, DENSE, OURS = RIVALS["tpu"]


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


def test_speed_up_is_stated_over_each_dense_rival():
    """Over another's kernels it is the product of what our kernels and what fewer heads bring: both are shown."""
    some = cells(lambda rival, seq_len: {SPLASH: 2.7e6, DENSE: 1.8e6, OURS: 1e6}[rival])
    assert table.speed_up(some, "layer", True, DENSE, OURS, 8192) == pytest.approx(1.8)
    lines = table.text(some, RIVALS["tpu"], "attention", False).splitlines()
    numbers, shares = lines[2].split()[:7], lines[2].split()[7:]
    assert numbers == ["2048", "2,700.0", "1,800.0", "1,000.0", "2.70", "1.80", "1"]
    assert shares == ["50%", "/", "50%", "/", "50%"]


def test_what_has_no_cost_leaves_a_gap():
    some = cells(lambda rival, seq_len: None if rival is OURS else 1.0)
    assert table.speed_up(some, "layer", True, DENSE, OURS, 8192) is None
    line = table.text(some, RIVALS["tpu"], "layer", False).splitlines()[2]
    assert line.split() == ["2048", "0.0", "0.0", "-", "-", "-"]


def test_csv_and_plot(tmp_path):
    table.write_csv(tmp_path / "x.csv", cells(), {"device": "v6e", "how": "static", "head_dim": 128})
    with open(tmp_path / "x.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(cells())
    assert [rows[0][name] for name in ("device", "how", "rival", "cost")] == ["v6e", "static", SPLASH.name, "1.0"]
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
    """A layer's kernels are counted with its attention: nothing else asks for schedules, which are slow to write. For
    the rest a rival gets the lower of two figures, GQE the higher. What is done is said as it is."""
    kernel_cycles = {SPLASH.name: 2000, DENSE.name: 1600, OURS.name: 700}

    def compile_nothing(jobs, on_result):
        results = []
        for n, job in enumerate(jobs):
            block = Block("0", 1, 1, 0, 0, 0, visits=kernel_cycles[job.options["rival"]["name"]])
            assert job.schedules == (job.options["part"] == "attention")
            xla = (Operation("fusion", 30, 20) if job.options["part"] == "layer" else Operation("copy", 3, 5),)
            results.append(Compiled("0.0", 0, 0, 0, "", (Kernel("k", (block,)),) if job.schedules else (), xla))
            on_result(n, results[-1], 1.0)
        return results

    monkeypatch.setattr(static, "compile_all", compile_nothing)
    result = static.measure("v5e", (2048,), 128)
    cost = {(c.part, c.rival): c.cost for c in result.cells if not c.backward}
    assert cost["attention", SPLASH.name] == 2003 and cost["layer", SPLASH.name] == 2020
    assert cost["attention", DENSE.name] == 1603 and cost["layer", DENSE.name] == 1620
    assert cost["attention", OURS.name] == 705 and cost["layer", OURS.name] == 730
    one_figure = [line.split(": ")[1] for line in static.report(result).splitlines() if "one figure" in line]
    layer = f"{1630 / 730:.2f} by XLA's estimates, {1620 / 720:.2f} by bytes"
    assert one_figure[2:] == [layer] * 2 and len(one_figure) == 4
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
    compiled = Compiled("0.0", 0, 0, 0, "", (kernel,), (Operation("copy", 7, 1),))
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


@pytest.mark.parametrize("rival", RIVALS["tpu"], ids=lambda rival: rival.name)
@pytest.mark.parametrize("backward", [False, True])
def test_a_layer_is_computed_by_its_rival(monkeypatch, rival, backward):
    """All attention of a rival's layer is computed by the implementation that its row names, and by no other."""
    called = []

    def check(name, platform, call):
        called.append(name)
        return Choice(name, "")

    monkeypatch.setattr(attend_module, "check", check)
    monkeypatch.setattr(attend_module, "choose", lambda *_: pytest.fail("nobody named the implementation"))
    monkeypatch.setattr(pallas_tpu_module, "tpu_generation", lambda: "v6e")
    monkeypatch.setattr(attend_module, "IMPLEMENTATIONS", IMPLEMENTATIONS | {})
    monkeypatch.setattr(rivals, "IMPLEMENTATIONS", attend_module.IMPLEMENTATIONS)
    s = Setting(256, num_heads=4, num_groups=2, d_model=64)
    given = dataclasses.asdict(rival), backward, dataclasses.asdict(s), "v6e"
    function, args = rivals.make("layer", *given)
    jax.eval_shape(function, *args)
    assert set(called) == {rival.implementation}


HLO = """HloModule jit_f, is_scheduled=true

%fused_computation (p: bf16[8,128]) -> bf16[8,128] {
  ROOT %c = bf16[8,128]{1,0:T(8,128)(2,1)} convolution(%p, %p), dim_labels=bf_io->bf
}

%body (t: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %x = f32[1000]{0:T(1024)} parameter(0)
  ROOT %reduce.1 = f32[8,100]{1,0:T(8,128)} reduce(%x, %x), backend_config={"estimated_cycles":"50"}
}

%condition (t: (s32[], f32[1000])) -> pred[] {
  %limit = s32[] constant(3)
}

ENTRY %main (a: bf16[8,128]) -> f32[] {
  %a = bf16[8192,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8192,128]{1,0:T(8,128)(2,1)S(1)} copy(%a), backend_config={"estimated_cycles":"9"}
  %matmul = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%b), kind=kOutput, calls=%fused_computation, backend_config={"estimated_cycles":"700"}
  %free = bf16[8,128]{1,0} bitcast(%matmul)
  %loop = (s32[], f32[1000]) while(%t), condition=%condition, body=%body
}
"""  # noqa: E501


def test_operations_outside_the_kernels():
    """By hand: 2 MiB of bfloat16 from HBM into vector memory on v5e, which moves 819e9 bytes/s and has 197e12 FLOP/s of
    4 units · 128 · 128 · 2; a loop of three trips; a matrix product keeps XLA's estimate."""
    found = {x.name: (x.estimate, x.need) for x in operations(HLO, "v5e")}
    bytes_per_cycle = 819e9 / (197e12 / (4 * 128 * 128 * 2))
    assert found == {
        "matmul": (700, 700),
        "reduce.1": (150, 3 * math.ceil(4 * (1024 + 8 * 128) / bytes_per_cycle)),
        "b": (9, math.ceil(2 * 2**20 / bytes_per_cycle)),
    }


@pytest.mark.parametrize(
    ("type_text", "expected"),
    [
        ("f32[3,100]{1,0:T(8,128)}", 4 * 8 * 128),
        ("f32[3,100]{0,1:T(8,128)}", 4 * 128 * 104),  # the first axis lies along the lanes
        ("(bf16[16,128]{1,0:T(8,128)(2,1)}, s32[5]{0:T(128)}, pred[2,2])", 2 * 16 * 128 + 4 * 128 + 4),
        ("bf16[16,128]{1,0:T(8,128)(2,1)S(1)}", 0),
        ("f32[]", 4),
    ],
)
def test_bytes_of_a_layout(type_text, expected):
    """Tiles round up the axes that they lie along; vector memory is not HBM."""
    assert hbm_bytes(type_text) == expected
