"""`gqe export`: folders that transformers loads to the same numbers, and what is left when it fails."""

import errno
import json
import os
import re

import converted
import jax.numpy as jnp
import numpy as np
import pytest
import torch_folder
from converted import BYTES, logits, tokens, write_run
from safetensors.numpy import load_file

from gqe_jax.attention import GQAConfig, GQEConfig, MLAConfig, RouterConfig
from gqe_jax.cli import main as cli
from gqe_jax.config import RopeScaling
from gqe_jax.convert import layer_to_torch
from gqe_jax.pytorch import exporting, safetensors_io
from gqe_jax.pytorch.exporting import export_hf, export_layers
from gqe_jax.runs.saved_model import open_model


def stretched(kind):
    return RopeScaling(kind=kind, factor=4.0, original_context=16)


HEADS = {"num_kv_heads": 2, "head_dim": 8}
GQE = GQEConfig(num_query_experts=4, **HEADS)
EVERYTHING = GQEConfig(
    num_query_experts=8,
    top_k=2,
    bias=True,
    qk_norm=True,
    window=9,
    rope_scaling=stretched("llama3"),
    router=RouterConfig(bias_update_rate=0.1),
    **HEADS,
)
# Attention → the class it is exported for, and a part of the reason.
CLASSES = {
    "gqe": (GQE, "GQEForCausalLM", "transformers has no class for GQE attention"),
    "gqa": (GQAConfig(num_query_heads=4, **HEADS), "LlamaForCausalLM", "no code in the folder"),
    "biases": (GQAConfig(num_query_heads=4, bias=True, **HEADS), "LlamaForCausalLM", ""),
    "mqa": (GQAConfig(num_query_heads=4, num_kv_heads=1, head_dim=8), "LlamaForCausalLM", ""),
    "sqa": (GQAConfig(num_query_heads=2, **HEADS), "LlamaForCausalLM", ""),
    "heads that do not divide the width": (GQAConfig(num_query_heads=6, **HEADS), "MistralForCausalLM", ""),
    "window": (GQAConfig(num_query_heads=4, window=9, **HEADS), "MistralForCausalLM", ""),
    "qk norm": (GQAConfig(num_query_heads=6, qk_norm=True, window=9, **HEADS), "Qwen3ForCausalLM", ""),
    "qk norm, biases": (GQAConfig(num_query_heads=4, qk_norm=True, bias=True, **HEADS), "Qwen3ForCausalLM", ""),
    "yarn": (GQAConfig(num_query_heads=4, rope_scaling=stretched("yarn"), **HEADS), "LlamaForCausalLM", ""),
    "dynamic": (GQAConfig(num_query_heads=4, rope_scaling=stretched("dynamic"), **HEADS), "LlamaForCausalLM", ""),
    "mla": (
        MLAConfig(num_query_heads=4, latent_dim=12, rope_dim=8, rope_repeats=2, out_bias=True, **HEADS),
        "GQEForCausalLM",
        "transformers has no class for MLA attention",
    ),
    "soft cap": (
        GQAConfig(num_query_heads=4, softcap=5.0, **HEADS),
        "GQEForCausalLM",
        "since each of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM has no soft cap "
        "(softcap=5.0)",
    ),
    "no rotary": (GQAConfig(num_query_heads=4, rope_theta=None, **HEADS), "GQEForCausalLM", "always has rotary"),
    "Qwen2's biases, bytes": (
        GQAConfig(num_query_heads=4, bias=True, out_bias=False, **HEADS),
        "GQEForCausalLM",
        "Qwen2ForCausalLM reads every tokenizer as its own (here: bytes)",
    ),
    "another epsilon": (
        GQAConfig(num_query_heads=4, qk_norm=True, qk_norm_eps=1e-5, **HEADS),
        "GQEForCausalLM",
        "Qwen3ForCausalLM has one epsilon (norm_eps=1e-06, qk_norm_eps=1e-05)",
    ),
}


@pytest.mark.parametrize("case", CLASSES)
def test_the_class_that_is_chosen_computes_the_same(tmp_path, case):
    """Dense models load without code of ours wherever transformers has them; logits in float32 differ by rounding only,
    and no weight is missing or left over (transformers would draw a missing one at random, in silence)."""
    pytest.importorskip("transformers")
    import torch

    attention, architecture, reason = CLASSES[case]
    model = write_run(tmp_path / "run", attention)
    why = export_hf(open_model(tmp_path / "run"), tmp_path / "out")
    assert why.startswith(architecture) and reason in why
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [architecture]
    assert ("auto_map" in config) == (tmp_path / "out" / "modeling_gqe.py").exists() == (architecture[:3] == "GQE")
    loaded = torch_folder.load(tmp_path / "out").eval()
    assert type(loaded).__name__ == architecture
    ids = tokens(BYTES["vocab_size"])
    with torch.no_grad():
        found = loaded(torch.tensor(ids).long()).logits.numpy()
    np.testing.assert_allclose(found, logits(model, ids), atol=2e-5)


@pytest.mark.parametrize("attention", [GQE, EVERYTHING, GQAConfig(num_query_heads=4, **HEADS)])
@pytest.mark.parametrize("tie", [True, False])
def test_weights_and_configuration_are_those_of_an_independent_export(tmp_path, attention, tie):
    """Against the parity tests' own, layer by layer, export; what only that one's reader ignores may differ."""
    model = write_run(tmp_path / "run", attention, tie_embeddings=tie)
    export_hf(open_model(tmp_path / "run"), tmp_path / "out", max_shard_size=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    found = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(file)
    wanted = torch_folder.torch_state(model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    if attention.kind == "gqe":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        wanted = torch_folder.hf_config(model.config) | {"bos_token_id": 1, "eos_token_id": 1}
        assert {key: config.get(key) for key in wanted} == wanted


def test_bfloat16_keeps_the_router(tmp_path):
    """Weights are rounded to nearest even; the router's stay float32, so that no choice changes by it alone."""
    model = write_run(tmp_path / "run", EVERYTHING)
    export_hf(open_model(tmp_path / "run"), tmp_path / "out", dtype="bfloat16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, value in torch_folder.torch_state(model).items():
        assert found[name].dtype == (np.float32 if ".router." in name else jnp.bfloat16), name
        np.testing.assert_array_equal(found[name], value.astype(found[name].dtype), err_msg=name)


def test_layers_in_the_package_gqes_names(tmp_path):
    """`layers.<i>.<name>` is what `layer_to_torch` gives of each layer, and nothing else is in the file."""
    import jax
    from flax import nnx

    model = write_run(tmp_path / "run", EVERYTHING)
    export_layers(open_model(tmp_path / "run"), tmp_path / "out")
    found = load_file(tmp_path / "out" / exporting.LAYERS_FILE)
    graphdef, state = nnx.split(model.layers.attention)
    wanted = {}
    for i in range(2):
        layer = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state))
        wanted |= {f"layers.{i}.{name}": value for name, value in layer_to_torch(layer).items()}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    description = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert (description["num_layers"], description["d_model"], description["attention"]["top_k"]) == (2, 32, 2)


# ---------------------------------------------------------------------------- the rest of the folder


def test_model_card_and_generation_config(tmp_path):
    """What a reader of the folder needs: size, attention, tokens seen, last metrics up to the step, how to load."""
    write_run(tmp_path / "run", GQE)
    lines = [{"step": 0, "loss": 5.5}, {"step": 0, "eval/bits_per_byte": 7.5}, {"step": 9, "loss": 1.0}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    export_hf(open_model(tmp_path / "run"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        "library_name: transformers",
        "in each of 2 KV groups a router picks 1 of 2 query heads per token; 3 heads attend",
        "| held-out bits per byte | 7.5000 (step 0) |",
        "| training loss, nats per token | 5.5000 (step 0) |",
        "| context | 256 |",
        "trust_remote_code=True",
    ):
        assert text in card
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def test_model_cards_code_runs(tmp_path, monkeypatch, capsys):
    """Pasted as it stands: it loads, generates, and prints text that begins with the prompt."""
    pytest.importorskip("transformers")
    write_run(tmp_path / "run", GQE)
    export_hf(open_model(tmp_path / "run"), tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.startswith("The ")


# ---------------------------------------------------------------------------- what goes wrong


@pytest.fixture
def gqe(tmp_path, capsys):
    """gqe("export ...") → (exit code, standard error); {} is the temporary folder, which holds a run."""
    write_run(tmp_path / "run", GQE)

    def call(line):
        code = cli.main(line.replace("{}", str(tmp_path)).split())
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    "line, message",
    [
        ("export --run {}/nowhere --out {}/out", "--run='{}/nowhere' holds no checkpoint: name the directory of a run"),
        ("export --run {}/run --step 7 --out {}/out", "no checkpoint of step 7 in"),
        ("export --run {}/run --out {}/full", "--out='{}/full' exists and is not an empty folder: name another one"),
        ("export --run {}/run --out {}/full/file", "--out='{}/full/file' exists and is not an empty folder"),
    ],
)
def test_what_cannot_be_exported(gqe, tmp_path, line, message):
    """One line and exit code 2; what is there stays as it is."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    code, err = gqe(line)
    assert code == 2 and message.replace("{}", str(tmp_path)) in err and err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "run"]
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_a_damaged_checkpoint_is_not_exported(gqe, tmp_path):
    """A flipped bit in the arrays is found before anything is written."""
    (file, *_) = (path for path in (tmp_path / "run/checkpoints/0/params").rglob("*") if path.stat().st_size > 300)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, err = gqe("export --run {}/run --out {}/out")
    assert code == 2 and "is damaged" in err and file.name in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("made", [False, True])
def test_full_disk(gqe, tmp_path, monkeypatch, made):
    """Found before, by the space that is left, or while writing: exit code 1, and nothing is left behind."""
    if made:
        (tmp_path / "out").mkdir()
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage)
        code, err = gqe("export --run {}/run --out {}/out")
    assert code == 1 and re.search(f"could not write {tmp_path}/out: it takes .* GB left; nothing is left behind", err)

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors_io, "_row_major", fail)
    code, err = gqe("export --run {}/run --out {}/out")
    assert code == 1 and "No space left on device; nothing is left behind. Free disk space" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out", "run"] if made else ["run"])
    assert not made or not list((tmp_path / "out").iterdir())


def test_interrupted(gqe, tmp_path, monkeypatch):
    """Ctrl-C while writing leaves nothing either."""

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_io, "_row_major", interrupt)
    assert gqe("export --run {}/run --out {}/out")[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_no_torch_is_needed(tmp_path):
    """Exporting imports neither torch nor transformers, nor the packages of tokenizers."""
    import subprocess
    import sys

    write_run(tmp_path / "run", GQE)
    code = (
        "import sys; from gqe_jax.cli import main as cli; code = cli.main(sys.argv[1:]); "
        "print(code, [m for m in ('torch', 'transformers', 'tokenizers', 'sentencepiece') if m in sys.modules])"
    )
    arguments = ["export", "--run", tmp_path / "run", "--out", tmp_path / "out"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    out = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert out.stdout.endswith("\n0 []\n"), out
    assert "GQEForCausalLM, in the folder's modeling_gqe.py" in out.stdout


def test_converted_runs_are_read_like_trained_ones(tmp_path):
    """`load_model` gives the parameters that were saved: what the other tests here export."""
    model = write_run(tmp_path / "run", EVERYTHING)
    found = converted.read_run(tmp_path / "run")
    wanted = converted.arrays_of(model)
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(found[path], value)
