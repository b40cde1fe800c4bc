"""The command line: help that works when pasted, and what it says about input that cannot be used."""

import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny_run import prepare_tiny, quick_compiles, write_config

from gqe_jax.cli import main as cli
from gqe_jax.config import MeshConfig
from gqe_jax.config_files import load_config
from gqe_jax.train import log, loop


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """data: prepared rows; tiny.py: a config of them; run: a run of 4 steps, with checkpoints of steps 2 and 4."""
    directory = tmp_path_factory.mktemp("place")
    prepare_tiny(directory / "data")
    write_config(directory / "tiny.py", directory / "data")
    with quick_compiles(directory / "compiled"):
        code = cli.main(["train", "--config", str(directory / "tiny.py"), "--run", str(directory / "run"),
                         "--config.train.steps=4"])  # fmt: skip
        assert code == 0
        yield directory


@pytest.fixture
def gqe(capsys, place):
    """gqe("train ...") → (exit code, standard output, standard error), in this process; {place} is replaced."""

    def call(line):
        try:
            code = cli.main(shlex.split(line.replace("{place}", str(place))))
        except SystemExit as leave:
            code = leave.code
        return code, *capsys.readouterr()

    return call


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every file: when it was written, and its content."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------- help


def examples(text: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in re.findall(r"^ +(gqe .*)$", text, re.MULTILINE)]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_shows_an_example_that_parses(gqe, verb):
    """Every option of the example is one of the verb's, and every override is a field of the configuration."""
    code, out, err = gqe(f"{verb} --help")
    assert (code, err) == (0, "") and out.startswith(f"usage: gqe {verb}")
    assert examples(out), out
    for words in examples(out):
        options = {word for word in words if re.fullmatch("--[a-z-]+", word)}
        verbs = itertools.takewhile(lambda word: word[0] != "-", words)
        code, help_of_it, _ = gqe(" ".join([*verbs, "--help"]))
        assert code == 0 and options <= set(re.findall(r"--[a-z-]+", help_of_it))
        overrides = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
        if "--config" in options:
            load_config(words[words.index("--config") + 1], overrides)


@pytest.mark.parametrize("line", ["--help", ""])
def test_help_of_gqe(gqe, line):
    """All verbs with what they do, and where to start; the same without any word, for who does not know the verbs."""
    code, out, err = gqe(line)
    assert (code, err) == (0, "") and all(verb in out for verb in cli.VERBS)
    assert "Start with: gqe train --config smoke --run runs/smoke" in out


def test_version(gqe):
    """The version of the package's metadata, which pyproject.toml states."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert gqe("--version") == (0, f"{project['name']} {project['version']}\n", "")


def test_help_names_what_can_be_chosen(gqe):
    """The configs that come with the package, and every axis of the mesh, which are the fields of `MeshConfig`."""
    words = set(re.findall(r"\w+", gqe("train --help")[1]))
    shipped = {path.stem for path in (Path(__file__).parents[1] / "gqe_jax/configs").glob("[a-z]*.py")}
    assert len(shipped) > 4 and shipped <= words
    words = set(re.findall(r"\w+", gqe("eval --help")[1]))
    assert {field.name for field in dataclasses.fields(MeshConfig)} <= words


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "line, message",
    [
        ("--verbose", "unrecognized arguments: --verbose"),
        ("tran", "'tran' is no verb: did you mean 'train'?; gqe --help explains them"),
        ("xyzzy", "'xyzzy' is no verb: known: bench, convert, eval, "),
        ("train", "the following arguments are required: --config, --run"),
        ("train smoke --run r --config smoke", "unrecognized arguments: smoke"),
        ("train --run r --config smoke --config.train.steps 30",
         "--config.train.steps has no value: write --config.train.steps=VALUE, without a space"),
        ("train --run r --conf smoke", "required: --config"),
        ("eval --run r --config.train.steps=3", "--config.train.steps=3: gqe eval takes no config overrides"),
        ("eval --run r --step two", "argument --step: invalid int value: 'two'"),
        ("inspect", "required: WHAT"),
    ],
)  # fmt: skip
def test_words_that_do_not_parse(gqe, line, message):
    """Usage and one line of what is wrong."""
    code, out, err = gqe(line)
    assert (code, out) == (2, "") and message in err and err.startswith("usage: gqe")


TRAIN = "train --config {place}/tiny.py --run {place}/new "
BAD_TRAINING = [
    ("--config.train.step=3", "unknown config key 'train.step': did you mean 'steps'?"),
    ("--config.train.steps=many", "train.steps='many' must be of type int: correct the value"),
    ("--config.model.attention.top_k=3",
     "in config.model.attention: top_k=3 exceeds experts_per_group=2 (num_query_experts=4 / num_kv_heads=2): lower "
     "top_k or raise num_query_experts"),
    ("--config.model.attention.num_kv_heads=3", "num_query_experts=4 is not a multiple of num_kv_heads=3"),
    ("--config.model.attention.head_dim=7", "head_dim=7 is odd, but rotary embedding"),
    ("--config.model.attention.implementation=cuda", "implementation='cuda' is unknown: use one of"),
    ("--config.model.vocab_size=258",
     "model.vocab_size=258 is smaller than the data's vocab_size=259 (tokenizer bytes): set model.vocab_size to at "
     "least 259, or prepare the data with a smaller tokenizer"),
    ("--config.data.path={place}/nowhere",
     "data.path='{place}/nowhere' holds no manifest.json, so it is no prepared data set: make one with"),
    ("--config.data.path={place}/empty", "data.path='{place}/empty' holds no manifest.json"),
    ("--config.data.path={place}/cut", "prepared data '{place}/cut' is damaged: train-00000-of-00001.arrayrecord is "
     "truncated (100 bytes, "),
    ("--config.data.path={place}/no_heldout",
     "data.path='{place}/no_heldout' holds no held-out text to evaluate on: prepare it again with --heldout above 0"),
    ("--config.model.context=32",
     "model.context=32 is shorter than the rows of {place}/data, which have 64 tokens: raise model.context, or prepare "
     "the data with --seq-len 32"),
    ("--config.data.batch_size=3 --config.train.accumulate=2",
     "data.batch_size=3 is not a multiple of train.accumulate=2: every microbatch needs the same number of rows"),
    ("--config.train.steps=3", "optimizer.warmup_steps=2 + decay_steps=2 exceed train.steps=3"),
    ("--config.data.tokenizer=none.model --config.data.path=None", "none.model"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bad_data(place):
    """Beside the good data: an empty directory, data with a shard cut off, data without held-out text."""
    (place / "empty").mkdir()
    shutil.copytree(place / "data", place / "cut")
    with (place / "cut" / "train-00000-of-00001.arrayrecord").open("r+b") as shard:
        shard.truncate(100)
    prepare_tiny(place / "no_heldout", heldout=0.0)


@pytest.mark.parametrize("arguments, message", BAD_TRAINING, ids=[case[0].partition(" ")[0] for case in BAD_TRAINING])
def test_what_cannot_be_trained(gqe, place, bad_data, arguments, message):
    """One paragraph: field, value, rule, remedy; nothing is written."""
    before = snapshot(place)
    code, _, err = gqe(TRAIN + arguments)
    assert code == 2 and err.startswith("gqe train: ") and err.count("\n") == 1, err
    assert message.replace("{place}", str(place)) in err
    assert not (place / "new").exists() and snapshot(place) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--config.model.d_ff=64 --config.model.qk_norm=True", "unknown config key 'model.qk_norm'"),
        ("--config.model.d_ff=64 --config.model.attention.qk_norm=True --config.train.steps=4",
         "--run='{place}/run' was made with another model config (model.attention.qk_norm was False and is now True; "
         "model.d_ff was 48 and is now 64): continue it with the config it was made with, or choose another directory"),
        ("--config.train.steps=3 --config.optimizer.decay_steps=0",
         "train.steps=3, but --run='{place}/run' has taken 4 steps already: raise train.steps"),
        ("--config.train.steps=4 --config.train.wandb=True", "train.wandb=True needs the package wandb, which is not"),
    ],
)  # fmt: skip
def test_run_that_does_not_fit(gqe, place, monkeypatch, arguments, message):
    """A run that exists is left as it is, to the last file; every difference is listed at once."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    before = snapshot(place / "run")
    code, _, err = gqe("train --config {place}/tiny.py --run {place}/run " + arguments)
    assert code == 2 and message.replace("{place}", str(place)) in err and err.count("\n") == 1, err
    assert snapshot(place / "run") == before


@pytest.mark.parametrize(
    "line, message",
    [
        ("eval --run {place}/nowhere", "--run='{place}/nowhere' holds no checkpoint: name the directory of a run that"),
        ("generate --run {place}", "--run='{place}' holds no checkpoint"),
        ("eval --run {place}/run --step 3",
         "no checkpoint of step 3 in {place}/run/checkpoints: choose one that is there (2, 4)"),
        ("eval --run {place}/run --data {place}/nowhere", "'{place}/nowhere' holds no manifest.json"),
        ("eval --run {place}/run --batch-size 0", "--batch-size=0 is no positive multiple of the 1 device(s) that"),
        ("generate --run {place}/run --prompt " + 64 * "x",
         "prompt has 64 tokens, but the model's context is 64 tokens, the new ones included: shorten the prompt to at "
         "most 63 tokens"),
        ("generate --run {place}/run --prompt x --max-new-tokens 64", "max_new_tokens=64 behind a prompt of 1 tokens"),
        ("generate --run {place}/run --temperature -1", "temperature=-1.0"),
        ("generate --run {place}/run --prompt-file {place}/nothing", "cannot be read"),
        ("inspect run --run {place}/nowhere", "{place}/nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(gqe, place, line, message):
    """Commands that use a run say which directory, step or prompt they cannot use; the run is left as it is."""
    before = snapshot(place)
    code, _, err = gqe(line)
    assert code == 2 and err.startswith(f"gqe {line.split()[0]}: ") and err.count("\n") == 1, err
    assert message.replace("{place}", str(place)) in err
    assert snapshot(place) == before and not (place / "nowhere").exists()


# ---------------------------------------------------------------------------- a run, and how it may end


def test_eval_and_generate_read_the_run(gqe, place):
    """Each needs the path of the run alone: configuration, data and tokenizer come from it."""
    code, out, _ = gqe("eval --run {place}/run --step 2")
    assert code == 0 and f"{place}/run, step 2: held-out loss" in out and "zlib -9" in out and "this model" in out
    code, out, err = gqe("generate --run {place}/run --prompt 'the quick' --max-new-tokens 5 --temperature 0")
    assert code == 0 and out.startswith("the quick") and " tokens in " in err
    assert json.loads((place / "run" / "config.json").read_text())["train"]["steps"] == 4


def test_no_room(gqe, place):
    """A run below a regular file: exit code 1, the path and the remedy, no traceback."""
    (place / "file").write_text("")
    code, _, err = gqe("train --config {place}/tiny.py --run {place}/file/run")
    assert code == 1 and err.count("\n") == 1
    assert f"could not write {place}/file/run" in err and "Not a directory" in err and "make the directory" in err


@pytest.mark.parametrize(
    "error, code, message",
    [
        (log.NonFiniteLoss("step 5: loss=nan"), 1, "gqe train: step 5: loss=nan\n"),
        (OSError(28, "No space left on device", "/some/file"), 1, "No space left on device: '/some/file'\n"),
        (KeyboardInterrupt(), 130, "gqe train: interrupted\n"),
        (loop.Interrupted(signal.SIGTERM, 7), 143,
         "gqe train: stopped by SIGTERM after step 7; its checkpoint is saved; the same command continues it\n"),
    ],
    ids=["numbers", "disk", "interrupt", "signal"],
)  # fmt: skip
def test_exit_codes(gqe, monkeypatch, error, code, message):
    """Whatever ends a run is one line and a code that says whose fault it is."""

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(loop, "train", fail)
    assert gqe(TRAIN)[0] == code
    assert gqe(TRAIN)[2].endswith(message)


def test_reader_that_leaves(place):
    """`gqe inspect run | head -1`: no traceback, and the exit code of a broken pipe."""
    command = [sys.executable, "-m", "gqe_jax.cli", "inspect", "run", "--run", str(place / "run")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")
