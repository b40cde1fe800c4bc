"""The registry of kinds: a kind of one's own meets every verb, and is answered or refused in one sentence."""

import ast
import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
import toy_kind

from gqe_jax.attention import KINDS, Attention, Kind
from gqe_jax.attention.kinds import checked
from gqe_jax.cli import main as cli
from gqe_jax.config_files import load_config
from gqe_jax.flops import parameter_count
from gqe_jax.models.transformer import abstract_model
from gqe_jax.parallel.mesh import MeshConfig, make_mesh
from gqe_jax.plan.memory import estimate
from gqe_jax.runs.metrics import read_metrics

TOY = Kind(toy_kind.GainConfig, toy_kind.GainAttention)
PACKAGE = Path(tiny_run.__file__).parents[1] / "gqe_jax"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with prepared rows and a config file of the toy kind."""
    directory = tmp_path_factory.mktemp("kinds")
    tiny_run.prepare_tiny(directory / "data", documents=60)
    file = tiny_run.write_config(directory / "toy.py", directory / "data")
    text = file.read_text().replace('kind="gqa", num_query_heads=4, **heads', 'kind="gain", **heads')
    file.write_text(text.replace('argument == "gqa"', "True"))
    return directory


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(KINDS, "gain", TOY)


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """A run of the toy kind, eight steps long, that was stopped and resumed half-way."""
    with pytest.MonkeyPatch.context() as patch, tiny_run.quick_compiles(tmp_path_factory.mktemp("cache")):
        patch.setitem(KINDS, "gain", TOY)
        train = ["train", "--config", str(place / "toy.py"), "--run"]
        assert cli.main([*train, str(place / "run")]) == 0
        shutil.copytree(place / "run", place / "resumed")
        for step in (6, 8):
            shutil.rmtree(place / "resumed/checkpoints" / str(step))
        assert cli.main([*train, str(place / "resumed")]) == 0
        yield place / "run"


def test_a_kind_of_ones_own_trains_logs_its_metrics_and_keeps_its_buffers(trained):
    """The gains move, the metric is logged under its own name, and the buffer is the largest gain that any step saw.
    A resumed run has the same arrays, buffers among them, bit for bit."""
    logged = [line["gain"] for line in read_metrics(trained) if "gain" in line]
    assert np.shape(logged) == (8, 2, 2) and np.abs(np.asarray(logged) - 1).max() > 1e-3
    arrays = tiny_run.read_arrays(trained, 8)
    (largest,) = (x for name, x in arrays.items() if name.endswith("['largest']"))
    np.testing.assert_allclose(largest, np.max(logged, axis=0), rtol=1e-6)
    assert tiny_run.leaf_hashes(trained.parent / "resumed", 8) == tiny_run.leaf_hashes(trained, 8)


@pytest.mark.parametrize(
    "line, said",
    [
        ("eval --run RUN", "bits/byte"),
        ("generate --run RUN --prompt the --max-new-tokens 4 --temperature 0", "the"),
        ("inspect run --run RUN", "gain: 2 heads, each with a gain"),
        ("inspect kernels --config CONFIG", "attention gain: 2 heads, each with a gain"),
    ],
)
def test_a_kind_of_ones_own_is_answered(trained, capsys, line, said):
    config = str(trained.parent / "toy.py")
    assert cli.main(line.replace("RUN", str(trained)).replace("CONFIG", config).split()) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["hf", "gqe"])
def test_a_kind_of_ones_own_is_not_exported_as_another(trained, capsys, layout):
    """No class of PyTorch's computes it: written as a Llama it would be another function."""
    out = trained.parent / layout
    assert cli.main(["export", "--run", str(trained), "--out", str(out), "--format", layout]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'gain' cannot be exported" in error and not out.exists()


def test_plans_of_a_kind_of_ones_own_count_what_it_has(place, capsys):
    """Its parameters, and memory by its own answers; it is dense, so there is no twin to compare with."""
    config = load_config(str(place / "toy.py"))
    leaves = jax.tree.leaves(abstract_model(config.model).layers.attention.gain)
    assert [leaf.shape for leaf in leaves] == [(2, 2)]
    assert parameter_count(config.model)["router"] == 2 * 2
    mesh = dict(make_mesh(MeshConfig()).shape)
    assert estimate(config, mesh, "train", 2, 64)["parameters"] > 4 * parameter_count(config.model)["total"] - 4
    line = ["plan", "--config", str(place / "toy.py"), "--topology", "v5e:2x2", "--compare", "gqa"]
    assert cli.main(line) == 2
    assert "is dense itself (attention.kind='gain'): drop it" in capsys.readouterr().err


def test_the_registry_refuses_a_kind_that_leaves_a_question_open():
    """An answer that is missing is found when the registry is built, and not as a wrong number later."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Silent(toy_kind.GainConfig):
        kind: str = "silent"

    Silent.__abstractmethods__ = frozenset({"flops", "cached_numbers"})
    with pytest.raises(TypeError, match="kind 'silent': Silent does not answer cached_numbers, flops"):
        checked({"silent": Kind(Silent, toy_kind.GainAttention)})
    with pytest.raises(TypeError, match="kind 'gain': Attention does not state _make, _compute"):
        checked({"gain": Kind(toy_kind.GainConfig, Attention)})
    with pytest.raises(TypeError, match="both have to be those of the kind"):
        checked({"other": TOY})


def test_nobody_else_asks_which_kind_it_is():
    """Outside gqe_jax/attention no code compares `.kind` of an attention config or its class: a kind that it does not
    know would be taken for another. Conversions and curves of heads are of kinds that they name, and refuse others.
    (Rope scaling, router and other things have a `kind` too: those names are told.)"""
    found = []
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE).parts
        if inside[0] in ("attention", "configs", "convert", "study") or "modelling" in inside:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Compare | ast.Call) else ""
            if (isinstance(node, ast.Compare) and "attention.kind" in text) or (
                text.startswith("isinstance(") and any(name in text for name in ("GQE", "GQA"))
            ):
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {text}")
    assert not found, "\n".join(found)
