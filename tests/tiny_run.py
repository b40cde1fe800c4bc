"""A run small enough for tests: prepared data of a predictable text, a config file of a model that learns it."""

import contextlib
import functools
import hashlib
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.compilation_cache import compilation_cache
from tiny import QUICK

from gqe_jax.config import RunConfig
from gqe_jax.config_files import load_config
from gqe_jax.data.manifest import Manifest
from gqe_jax.data.preparing.prepare import prepare
from gqe_jax.data.sources.corpus import files_corpus
from gqe_jax.data.tokenizer import ByteTokenizer
from gqe_jax.runs.checkpoint import Checkpoints
from gqe_jax.runs.metrics import read_metrics
from gqe_jax.train import loop

CONTEXT = 64
QUICK_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())

CONFIG = '''
from gqe_jax.config_dict import defaults

def get_config(argument=None):
    """Argument: "gqa" for dense attention."""
    heads = dict(num_kv_heads=2, head_dim=8, implementation="reference")  # the quickest to compile
    if argument == "gqa":
        config = defaults(kind="gqa", num_query_heads=4, **heads)
    else:
        config = defaults(num_query_experts=4, **heads)
    config.name = "tiny"
    config.model.update(d_model=32, num_layers=2, d_ff=48, context=64, dtype="float32")
    config.data.update(path=PATH, batch_size=2)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=2, decay_steps=2)
    config.train.update(steps=8, log_every=1, eval_every=0, checkpoint_every=2)
    return config
'''


def write_config(path: Path, data: Path) -> Path:
    """The config file of the tiny run, reading the prepared rows in `data`."""
    path.write_text(CONFIG.replace("PATH", repr(str(data))))
    return path


def prepare_tiny(directory: Path, *, documents: int = 200, seed: int = 0, heldout: float = 0.1, **options) -> Manifest:
    """Prepares documents of random length in which every line is the same, beside an own text for each."""
    rng = random.Random(seed)
    texts = directory.parent / f"{directory.name}_texts"
    texts.mkdir()
    for number in range(documents):
        lines = itertools.repeat("the quick brown fox, é\n", rng.randint(1, 9))
        (texts / f"{number}.txt").write_text(f"{number} " + "".join(lines))
    corpus = files_corpus([str(texts / "*.txt")])
    settings = {"tokenizer": ByteTokenizer(), "seq_len": CONTEXT, "heldout_fraction": heldout}
    return prepare(corpus, directory, **settings | options)


def tiny_config(data: Path, *overrides: str, argument: str = "") -> RunConfig:
    """The configuration of the tiny run, with overrides as on the command line, without "--config."."""
    file = write_config(data.parent / f"{data.name}.py", data)
    return load_config(f"{file}:{argument}", overrides)


@contextlib.contextmanager
def quick_compiles(cache: Path):
    """Traces each configuration once, and compiles once and with little effort: most of a tiny run's time is that."""
    settings = {
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    quick = mock.patch.object(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
    once = mock.patch.object(loop, "Step", functools.cache(loop.Step))  # pure functions: its arrays come as arguments
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        with quick, once:
            yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def start_gqe(*arguments: object, flags: str = QUICK_FLAGS) -> subprocess.Popen:
    """The command `gqe` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "gqe_jax.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        cwd=Path(__file__).parents[1],
    )


def losses(directory: Path) -> dict[int, float]:
    """Training loss by step, as logged; each step once."""
    lines = [line for line in read_metrics(directory) if "loss" in line]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), f"steps logged twice or out of order: {steps}"
    return {line["step"]: line["loss"] for line in lines}


def read_arrays(directory: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, read without the code that trains."""
    Checkpoints(directory / "checkpoints").verify(step)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = {}
    for item in ("params", "opt_state", "train"):
        path = (directory / "checkpoints" / str(step) / item).absolute()
        if not path.is_dir():  # a checkpoint of parameters alone
            continue
        handler = ocp.StandardCheckpointHandler()
        tree = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), handler.metadata(path).tree
        )
        tree = handler.restore(path, args=ocp.args.StandardRestore(tree))
        arrays |= {item + jax.tree_util.keystr(name): np.asarray(x) for name, x in jax.tree.leaves_with_path(tree)}
    return arrays


def leaf_hashes(directory: Path, step: int) -> dict[str, str]:
    """sha256 of every array of a checkpoint, its dtype and its shape."""
    return {
        name: hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()).hexdigest()
        for name, x in read_arrays(directory, step).items()
    }
