"""README and docs: every `gqe` line parses and every configuration in it exists; README's code runs in its order."""

import argparse
import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gqe_jax.cli import main as cli
from gqe_jax.config_files import load_config
from gqe_jax.configs import shipped_configs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_lines(page: Path) -> list[str]:
    """Lines of fenced and indented code; one that ends with a backslash is joined with the next."""
    lines, fenced = [], False
    for line in page.read_text().replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
    return lines


def test_the_page_of_fields_is_that_of_the_dataclasses():
    """The page lists every field with type, default and meaning; the generator refuses a field without a meaning."""
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.FILE.read_text() == page.text(), "run: python docs/make_configuration.py"
    leaves = re.findall(r"^\| `([\w.]+)` \| (?!a section)", page.text(), re.MULTILINE)
    for name in ("smoke", "gqa_250m"):
        config = load_config(name)
        assert {".".join(path) for path in paths(config)} <= set(leaves)


def paths(config, prefix=()):
    """The path of every field of a configuration that is no section."""
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), (*prefix, field.name)
        if dataclasses.is_dataclass(value):
            yield from paths(value, path)
        else:
            yield path


# `gqe VERB`, also behind variables of the environment, `launch.sh --` or the like.
COMMANDS = [
    (f"{page.name}: {command[1]}", command[1])
    for page in PAGES
    for line in code_lines(page)
    if (command := re.search(r"(?:^|[ ;])(gqe [a-z]+ .*)", line)) and not line.startswith("#")
]


@pytest.mark.parametrize("command", [command for _, command in COMMANDS], ids=[name for name, _ in COMMANDS])
def test_commands_parse(command, monkeypatch):
    """Whoever pastes a line gets past its options and its configuration. What the line then does needs data, a run, the
    Hub or a cloud, and is tested with the verb."""
    parsed = []

    def take(args: argparse.Namespace) -> int:
        parsed.append(args)
        return 0

    if command.count("'") % 2:  # the end of a quotation that began before it: --command='...; gqe train ...'
        command = command.removesuffix("'")
    words = [word for word in shlex.split(command, comments=True) if word != "&"]
    verb = words[1]
    assert verb in cli.VERBS
    module = __import__(f"gqe_jax.cli.{cli.VERBS[verb][1]}", fromlist=["run"])
    monkeypatch.setattr(module, "run", take)
    assert cli.main(words[1:]) == 0
    (args,) = parsed
    config = getattr(args, "config", None)
    if config and config.partition(":")[0] in shipped_configs():
        load_config(config, args.overrides)


def test_lines_are_found():
    """The pages show far more commands than this; a pattern that finds none would pass every test above."""
    assert len(COMMANDS) > 50 and {name.partition(":")[0] for name, _ in COMMANDS} >= {"README.md", "data.md"}


@pytest.mark.slow
def test_readme_code_runs():
    """The layer, its weights to PyTorch's names and back, the Linen model, and the same layer over a mesh: in a process
    with eight devices, as one program. Left out: the export in PyTorch, which test_pytorch_model_* load and sample."""
    text = (ROOT / "README.md").read_text()
    layer, linen, _pytorch = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    section = text.partition("## Many devices")[2].partition("\n## ")[0]
    blocks = re.findall(r"(?:^    .*\n)+", section, re.MULTILINE)
    meshes = [re.sub("^    ", "", block, flags=re.MULTILINE) for block in blocks if "set_mesh" in block]
    assert len(meshes) == 2
    call = """
variables = Block().init({"params": jax.random.key(0)}, x)
y, _ = Block().apply(variables, x, train=True, rngs={"router": jax.random.key(1)})
assert y.shape == x.shape
"""
    model = "from flax import linen as nn\n" + linen + call
    after = "import numpy as np\nnp.testing.assert_allclose(y, layer(x)[0], atol=1e-5)\n"
    program = "\n".join([layer, model, meshes[0], after, meshes[1], after])
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | settings)
    assert done.returncode == 0, done.stderr[-3000:]
