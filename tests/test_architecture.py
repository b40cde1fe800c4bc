"""Folders and root modules point one way: each imports from the floors below it, and from its own."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gqe_jax"

# From the bottom up. What stands on one floor may import each other's only within a folder.
FLOORS = (
    ("lazy", "remat", "config", "tpu", "rounding"),
    ("checked_json",),
    ("safe_names",),
    ("kernels", "parallel", "processes"),
    ("linear",),
    ("attention",),
    ("models", "flops", "cost"),
    ("config_dict", "config_overrides"),
    ("configs",),
    ("config_files",),
    ("data",),
    ("runs",),
    ("pytorch",),
    ("generate",),
    ("evaluate",),
    ("convert",),
    ("train",),
    ("aot",),
    ("plan", "bench"),
    ("study",),
    ("cli",),
)
DATA_FLOORS = (("tokenizer", "choices"), ("sources",), ("manifest", "rows"), ("preparing",), ("reading",))


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module below the package) of every import of this package in a file, also inside functions; names for
    type checkers alone are left out."""
    found, tree = [], ast.parse(path.read_text())
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    unseen = {below for node in typing for statement in node.body for below in ast.walk(statement)}
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gqe_jax":
            module = node.module.removeprefix("gqe_jax").removeprefix(".")
            found += [(node.lineno, module or alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, a.name[8:]) for a in node.names if a.name.startswith("gqe_jax.")]
    return found


def upward(root: Path, prefix: str, floors: tuple[tuple[str, ...], ...]) -> list[str]:
    """Imports between the rooms of a folder that do not point down."""
    floor = {name: number for number, names in enumerate(floors) for name in names}
    wrong = []
    for path in sorted(root.rglob("*.py")):
        if path.parent == root and path.stem.startswith("__"):
            continue
        own = path.relative_to(root).parts[0].removesuffix(".py")
        assert own in floor, f"{own} has no floor: give it one in this file, above all that it imports"
        for line, module in imports(path):
            if not module.startswith(prefix):
                continue
            other = module.removeprefix(prefix).split(".")[0]
            if other and other != own and floor.get(other, -1) >= floor[own]:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {module}")
    return wrong


@pytest.mark.parametrize("folder, prefix, floors", [("", "", FLOORS), ("data", "data.", DATA_FLOORS)])
def test_imports_point_down(folder, prefix, floors):
    """Whoever reads a folder need not know those above it; and no two depend on each other."""
    wrong = upward(PACKAGE / folder, prefix, floors)
    assert not wrong, "\n".join(wrong)


def test_arguments_are_parsed_in_one_wing():
    """Below gqe_jax/cli functions have typed parameters, for those who call them from Python."""
    found = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] != "cli" and "import argparse" in path.read_text()
    ]
    assert found in ([], ["bench/splash.py"])  # a program of its own, for who tunes the rival
