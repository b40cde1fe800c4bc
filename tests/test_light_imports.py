"""What is imported when: help and workers do without JAX, and the packages' lazy names are what they claim to be."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "torch", "tensorflow")


def run_python(*arguments: object) -> str:
    """Standard output of a fresh interpreter."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    return done.stdout


HELP = """
import contextlib, io, sys
from gqe_jax.cli.main import VERBS, main
lines = [["--help"], ["--version"], [], *([verb, "--help"] for verb in VERBS)]
lines += [["bench", "attention", "--help"], ["bench", "data", "--help"]]
lines += [["inspect", what, "--help"] for what in ("run", "data", "kernels")]
lines += [["study", what, "--help"] for what in ("run", "table", "plot")]
for line in lines:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main(line)
    assert out.getvalue(), line
print([name for name in sys.argv[1:] if name in sys.modules])
"""


def test_help_imports_no_library():
    """All help together needs the standard library alone: any other import would make it slow."""
    assert run_python("-c", HELP, *HEAVY, "numpy", "ml_collections", "etils", "array_record") == "[]\n"


WORKER = """
import json, os, pathlib, sys
from gqe_jax.data.preparing import units
from gqe_jax.data.preparing.prepare import prepare
from gqe_jax.data.sources.corpus import files_corpus
from gqe_jax.data.tokenizer import ByteTokenizer

units._UNIT_BYTES = 100
write_unit = units.Job.write_unit

def recorded(*arguments):  # in workers too, which import this file
    write_unit(*arguments)
    (pathlib.Path(sys.argv[2]) / f"{os.getpid()}.json").write_text(json.dumps(sorted(sys.modules)))

units.Job.write_unit = recorded
if __name__ == "__main__":
    corpus = files_corpus([sys.argv[1] + "/*.txt"])
    prepare(corpus, sys.argv[3], tokenizer=ByteTokenizer(), seq_len=32, workers=2)
    print(os.getpid())
"""


def test_a_preparing_worker_imports_no_jax(tmp_path):
    """Each worker is a fresh process that imports what its unit of work needs: JAX would cost 150 MB in each."""
    for name in ("texts", "modules"):
        (tmp_path / name).mkdir()
    for number in range(6):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text {number} " * 30)
    (tmp_path / "script.py").write_text(WORKER)
    parent = run_python(tmp_path / "script.py", *(tmp_path / name for name in ("texts", "modules", "out"))).strip()
    recorded = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "modules").iterdir()}
    assert recorded and parent not in recorded  # the work was done by other processes
    for modules in recorded.values():
        assert "gqe_jax.data.preparing.units" in modules
        assert not set(HEAVY) & set(modules)


@pytest.mark.parametrize("package", ["gqe_jax", "gqe_jax.data"])
def test_lazy_names(package):
    """The names under TYPE_CHECKING, those that `__getattr__` gives and those of `__all__` are the same."""
    module = importlib.import_module(package)
    (block,) = (node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.If))
    claimed = {alias.name: statement.module for statement in block.body for alias in statement.names}
    assert set(claimed) == set(module.__all__) <= set(dir(module))
    assert len(module.__all__) == len(set(module.__all__))
    for name, home in claimed.items():
        of_package = home == package  # a module, such as gqe_jax.convert
        found = importlib.import_module(f"{home}.{name}") if of_package else vars(importlib.import_module(home))[name]
        assert getattr(module, name) is found
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'attnd'"):
        module.attnd  # noqa: B018
    code = f"import sys, {package}; print(dir({package}) != [], [name for name in sys.argv[1:] if name in sys.modules])"
    assert run_python("-c", code, *HEAVY) == "True []\n"


def test_converters_are_reached_from_the_package():
    """`import gqe_jax` alone is enough for `gqe_jax.convert.layer_to_torch`, as it is documented."""
    assert run_python("-c", "import gqe_jax; print(gqe_jax.convert.layer_to_torch.__name__)") == "layer_to_torch\n"
