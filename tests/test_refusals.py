"""What can be refused is refused before the first write: exit code 2, one sentence, and no run's folder."""

import shutil
import sys

import pytest
from tiny_run import prepare_tiny, write_config

from gqe_jax.cli.main import main


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared") / "data"
    prepare_tiny(directory, documents=20)
    return directory


def shard(data, split):
    return next(path for path in sorted(data.iterdir()) if path.name.startswith(split) and "record" in path.name)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def without_heldout(data):
    shutil.rmtree(data)
    prepare_tiny(data.with_name("other"), documents=5, heldout=0.0)
    data.with_name("other").rename(data)


REFUSALS = {
    "an implementation for TPUs": ("model.attention.implementation=pallas_tpu", None, "pallas_tpu needs a TPU"),
    "an implementation for GPUs": ("model.attention.implementation=cudnn", None, "cudnn needs an NVIDIA GPU"),
    "an extra": ("train.wandb=True", None, "pip install 'gqe_jax[wandb]'"),
    "another extra": ("train.tensorboard=True", None, "pip install 'gqe_jax[tensorboard]'"),
    "a mesh": ("mesh.data=3", None, "need 3 devices, but there are 1"),
    "a mesh that leaves a rest": ("mesh.expert=3", None, "devices, but there are 1"),
    "microbatches": ("train.accumulate=5", None, "not a multiple of train.accumulate=5"),
    "a context": ("model.context=32", None, "context"),
    "a vocabulary": ("model.vocab_size=100", None, "vocab_size=100"),
    "no data": ("data.path=nowhere", None, "nowhere"),
    "a torn manifest": ("", lambda data: cut(data / "manifest.json"), "manifest.json"),
    "a manifest that is a list": ("", lambda data: (data / "manifest.json").write_text("[]"), "manifest.json"),
    "a torn shard": ("", lambda data: cut(shard(data, "train")), "damaged"),
    "another byte": ("", lambda data: flip(shard(data, "train")), "damaged"),
    "a torn held-out shard": ("", lambda data: cut(shard(data, "heldout")), "damaged"),
    "no held-out rows": ("", without_heldout, "no held-out text"),
    "a window of steps": ("train.profile_steps=5:2", None, "train.profile_steps='5:2'"),
    "a bound": ("train.stall_seconds=0.0", None, "train.stall_seconds=0.0 must be positive"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_before_the_first_write(prepared, tmp_path, monkeypatch, capsys, name):
    override, spoil, message = REFUSALS[name]
    for package in ("wandb", "tensorboardX"):
        monkeypatch.setitem(sys.modules, package, None)
    shutil.copytree(prepared, tmp_path / "data")
    if spoil is not None:
        spoil(tmp_path / "data")
    config = write_config(tmp_path / "tiny.py", tmp_path / "data")
    run = tmp_path / "new" / "run"
    code = main(["train", "--config", str(config), "--run", str(run), *([f"--config.{override}"] if override else [])])
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("gqe train: ") and message in err
    assert not run.parent.exists()
