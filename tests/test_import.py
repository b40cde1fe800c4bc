"""`gqe import`: transformers' own models to the same logits, round trips to the bit, and input that cannot be used."""

import json
import os
import shlex
import shutil
import weakref

import numpy as np
import pytest
import torch_folder
from converted import BYTES, logits, read_run, tokens, write_run
from safetensors.numpy import load_file, save_file
from tiny_run import prepare_tiny, quick_compiles

from gqe_jax.attention import AsymGQAConfig, GQAConfig, GQEConfig, KeyDrivenConfig, RouterConfig
from gqe_jax.cli import main as cli
from gqe_jax.config import ConfigError, RopeScaling
from gqe_jax.config_files import load_config
from gqe_jax.data.tokenizer import ByteTokenizer
from gqe_jax.pytorch.exporting import export_hf, export_layers
from gqe_jax.pytorch.hf_tokenizer import tokenizer_files
from gqe_jax.pytorch.importing import import_folder, import_layers
from gqe_jax.pytorch.safetensors_io import StoredTensor
from gqe_jax.runs.load import load_model
from gqe_jax.runs.saved_model import open_model

HEADS = {"num_kv_heads": 2, "head_dim": 8}
EVERYTHING = GQEConfig(
    num_query_experts=8,
    top_k=2,
    bias=True,
    qk_norm=True,
    qk_norm_eps=1e-5,
    window=9,
    softcap=4.0,
    rope_theta=500.0,
    rope_scaling=RopeScaling(kind="dynamic", factor=4.0, original_context=16),
    router=RouterConfig(bias_update_rate=0.125, jitter=0.25, load_balance_weight=0.5, z_loss_weight=0.25, seed=7),
    **HEADS,
)

# ---------------------------------------------------------------------------- dense models of transformers

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "Llama": ("Llama", {}),
    "Llama, MHA, width / heads": ("Llama", {"num_key_value_heads": 4, "head_dim": None}),
    "Llama, biases": ("Llama", {"attention_bias": True, "head_dim": 12}),
    "Llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}),
    "Llama, dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 16},
    ),
    "Llama, llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "Llama, yarn": ("Llama", {"rope_parameters": YARN | {"beta_fast": 4.0, "beta_slow": 2.0}}),
    "Llama, yarn, amplitude": ("Llama", {"rope_parameters": YARN | {"attention_factor": 0.75}}),
    "Llama, yarn, two exponents": ("Llama", {"rope_parameters": YARN | {"mscale": 0.5, "mscale_all_dim": 0.75}}),
    "SmolLM": ("Llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36, "head_dim": 4,
                         "tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Mistral, window": ("Mistral", {"sliding_window": 7, "num_attention_heads": 6}),
    "Qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen2, window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "Qwen3": ("Qwen3", {"rms_norm_eps": 1e-5}),
    "Qwen3, biases, window, tied": ("Qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 7,
                                              "max_window_layers": 0, "tie_word_embeddings": True}),
}  # fmt: skip


def write_transformers(folder, family, **options):
    """A folder that transformers wrote, with a tokenizer; its model in evaluation mode, no parameter as it starts."""
    import torch
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": False}
    config = getattr(transformers, f"{family}Config")(**(BYTES | sizes | more | options))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2 if "bias" in name or "embed" in name else parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    for name, content in tokenizer_files(ByteTokenizer(), 64).items():
        if name != "bytes.json":
            (folder / name).write_bytes(content)
    return model


@pytest.mark.parametrize("case", FAMILIES)
def test_dense_models_of_transformers(tmp_path, case):
    """The same logits as transformers' own code, beyond the unstretched context too; and back: the same class (a
    Mistral without a window is a Llama), and every tensor to the bit."""
    pytest.importorskip("transformers")
    import torch

    family, options = FAMILIES[case]
    original = write_transformers(tmp_path / "from", family, **options)
    config = import_folder(tmp_path / "from", tmp_path / "run")
    assert config == load_config(str(tmp_path / "run" / "config.py"))
    ids = tokens(BYTES["vocab_size"])
    with torch.no_grad():
        wanted = original(torch.tensor(ids).long()).logits.numpy()
    found = logits(load_model(tmp_path / "run").model, ids)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(found, wanted, atol=1e-4)

    why = export_hf(open_model(tmp_path / "run"), tmp_path / "back")
    assert why.startswith("Llama" if case == "Mistral" else family)
    before = load_file(tmp_path / "from" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    back = torch_folder.load(tmp_path / "back").eval()
    with torch.no_grad():
        np.testing.assert_array_equal(back(torch.tensor(ids).long()).logits.numpy(), wanted)


def test_fused_projections(tmp_path):
    """Phi-3 has q, k and v in one tensor and gate and up in another: the same logits, of a window too."""
    pytest.importorskip("transformers")
    import torch

    ends = {"pad_token_id": 0, "eos_token_id": 1}  # else Phi-3's own, beyond this vocabulary
    original = write_transformers(tmp_path / "from", "Phi3", head_dim=8, sliding_window=7, **ends)
    import_folder(tmp_path / "from", tmp_path / "run")
    ids = tokens(BYTES["vocab_size"])
    with torch.no_grad():
        wanted = original(torch.tensor(ids).long()).logits.numpy()
    np.testing.assert_allclose(logits(load_model(tmp_path / "run").model, ids), wanted, atol=1e-4)


def test_half_precision_folders(tmp_path):
    """bfloat16 weights become float32 parameters without loss, or stay as they are; the model computes in bfloat16."""
    pytest.importorskip("transformers")
    import torch

    model = write_transformers(tmp_path / "from", "Llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "from")
    wanted = load_file(tmp_path / "from" / "model.safetensors")
    for dtype in ("float32", "bfloat16"):
        config = import_folder(tmp_path / "from", tmp_path / dtype, dtype=dtype)
        assert (config.model.dtype, config.model.param_dtype) == ("bfloat16", dtype)
        assert all(array.dtype == dtype for array in read_run(tmp_path / dtype).values())
        export_hf(open_model(tmp_path / dtype), tmp_path / f"{dtype}_back", dtype="bfloat16")
        found = load_file(tmp_path / f"{dtype}_back" / "model.safetensors")
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_what_old_folders_hold_besides(tmp_path):
    """Tables of rotary frequencies, and a head that is tied anyway, are no parameters."""
    write_run(tmp_path / "run", GQAConfig(num_query_heads=4, **HEADS), tie_embeddings=True)
    export_hf(open_model(tmp_path / "run"), tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32) for i in range(2)}
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, tmp_path / "out" / "model.safetensors")
    import_folder(tmp_path / "out", tmp_path / "back")
    assert_same_parameters(tmp_path / "back", tmp_path / "run")


# ---------------------------------------------------------------------------- round trips


def assert_same_parameters(run, other):
    found, wanted = read_run(run), read_run(other)
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        assert found[path].dtype == value.dtype, path
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "attention",
    [
        EVERYTHING,
        GQEConfig(num_query_experts=4, variant="weighted_concat", rope_theta=None, **HEADS),
        GQEConfig(num_query_experts=4, router=RouterConfig(kind="random", seed=3), **HEADS),
        GQAConfig(num_query_heads=4, softcap=3.0, bias=True, **HEADS),
        AsymGQAConfig(num_query_heads=5, max_group_size=4, bias=True, **HEADS),
        KeyDrivenConfig(num_query_heads=6, allocation="dgqa_diff", allocation_floor=0, perturb=True, **HEADS),
    ],
    ids=["everything", "weighted_concat", "random", "dense, soft cap", "unequal groups", "key-driven"],
)
def test_round_trip_is_bitwise(tmp_path, attention, dtype):
    """Run → folder of several shards → run: every parameter to the bit (routers are float32 in both), the attention's
    configuration field by field, the tokenizer."""
    write_run(tmp_path / "run", attention, param_dtype=dtype, tie_embeddings=False)
    export_hf(open_model(tmp_path / "run"), tmp_path / "out", max_shard_size=20_000)
    config = import_folder(tmp_path / "out", tmp_path / "back", dtype=dtype)
    assert_same_parameters(tmp_path / "back", tmp_path / "run")
    saved, back = open_model(tmp_path / "run"), open_model(tmp_path / "back")
    assert config.model.attention == saved.config.model.attention
    assert config.model.context == saved.config.model.context
    assert back.tokenizer.digest == saved.tokenizer.digest


@pytest.mark.parametrize(
    "attention, name, value, said",
    [
        (AsymGQAConfig(num_query_heads=5, max_group_size=4, **HEADS), "head_mask", np.ones((2, 4)), "[8, 5] query"),
        (KeyDrivenConfig(num_query_heads=6, **HEADS), "heads_per_kv", np.array([7, -1]), "must add up to 6 query"),
        (KeyDrivenConfig(num_query_heads=6, **HEADS), "heads_per_kv", np.array([3, 2]), "is [[3, 2], ["),
    ],
)
def test_groups_that_are_none_are_refused(tmp_path, attention, name, value, said):
    """Which query head reads which KV head stands in the weights: nonsense there would be another function."""
    write_run(tmp_path / "run", attention)
    export_hf(open_model(tmp_path / "run"), tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    state[f"model.layers.0.self_attn.{name}"] = value.astype(np.float32)
    save_file(state, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ConfigError) as error:
        import_folder(tmp_path / "out", tmp_path / "back")
    assert said in str(error.value) and not (tmp_path / "back").exists()


def test_layers_round_trip(tmp_path):
    """Attention layers out of a user's checkpoint with names of its own; the rest is as training would start it."""
    write_run(tmp_path / "run", EVERYTHING)
    saved = open_model(tmp_path / "run")
    export_layers(saved, tmp_path / "layers")
    state = load_file(tmp_path / "layers" / "attention.safetensors")
    mine = {name.replace("layers.", "net.blocks."): value for name, value in state.items()}
    save_file(mine | {"net.head": np.zeros(3, np.float32)}, tmp_path / "mine.safetensors")
    with quick_compiles(tmp_path / "compiled"):
        import_layers(tmp_path / "mine.safetensors", tmp_path / "back", saved.config, pattern="net.blocks.{layer}.")
    found, wanted = read_run(tmp_path / "back"), read_run(tmp_path / "run")
    for path in wanted:
        assert np.array_equal(found[path], wanted[path]) == (path.startswith("layers.attention.")), path
    norms = [found[path] for path in found if path.endswith("_norm.scale") and "attention." not in path]
    assert norms and all((norm == 1).all() for norm in norms)


def test_one_tensor_in_memory_at_a_time(tmp_path, monkeypatch):
    """When a tensor is read, those before it are gone: only the model that is being filled stays."""
    write_run(tmp_path / "run", EVERYTHING)
    export_hf(open_model(tmp_path / "run"), tmp_path / "out", max_shard_size=20_000)
    alive, reading = [], StoredTensor.read

    def read(stored):
        assert all(reference() is None for reference in alive)
        array = reading(stored)
        alive.append(weakref.ref(array))
        return array

    monkeypatch.setattr(StoredTensor, "read", read)
    import_folder(tmp_path / "out", tmp_path / "back")
    assert len(alive) > 30


@pytest.mark.slow
def test_an_imported_run_is_trained_on(tmp_path, capsys):
    """The commands that `gqe import` prints go on from its checkpoint, with the optimizer fresh."""
    prepare_tiny(tmp_path / "data")
    write_run(tmp_path / "run", GQEConfig(num_query_experts=4, **HEADS))
    with quick_compiles(tmp_path / "compiled"):
        assert cli.main(["export", "--run", f"{tmp_path}/run", "--out", f"{tmp_path}/out"]) == 0
        assert cli.main(["import", "--from", f"{tmp_path}/out", "--run", f"{tmp_path}/back"]) == 0
        printed = capsys.readouterr().out
        assert f"gqe train --config {tmp_path}/back/config.py --run {tmp_path}/back --config.data.path=" in printed
        short = ["--config.train.steps=2", "--config.optimizer.warmup_steps=0", "--config.optimizer.decay_steps=0"]
        train = ["train", "--config", f"{tmp_path}/back/config.py", "--run", f"{tmp_path}/back", *short]
        assert cli.main([*train, f"--config.data.path={tmp_path}/data", "--config.train.eval_batches=1"]) == 0
    assert f"resuming {tmp_path}/back from step 0" in capsys.readouterr().out
    before, after = read_run(tmp_path / "run"), read_run(tmp_path / "back")
    moved = [np.abs(after[path].astype(np.float32) - value).max() for path, value in before.items()]
    assert 0 < max(moved) < 1e-4  # two steps of at most the learning rate, 1e-5, each


def test_layers_of_an_export_are_read_as_the_message_says(tmp_path):
    """A folder of attention layers alone is no model; what to type instead is in the message, and works."""
    write_run(tmp_path / "run", EVERYTHING)
    saved = open_model(tmp_path / "run")
    export_layers(saved, tmp_path / "layers")
    with pytest.raises(ConfigError) as error:
        import_folder(tmp_path / "layers", tmp_path / "back")
    assert "layers' holds attention layers alone, as gqe export --format gqe writes them: " in str(error.value)
    _, source, _, pattern, *_ = shlex.split(str(error.value).partition("whole model with ")[2])
    with quick_compiles(tmp_path / "compiled"):
        import_layers(source, tmp_path / "back", saved.config, pattern=pattern)
    found, wanted = read_run(tmp_path / "back"), read_run(tmp_path / "run")
    assert all(np.array_equal(found[path], wanted[path]) for path in wanted if path.startswith("layers.attention."))


# ---------------------------------------------------------------------------- what cannot be imported


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder that can be imported, of a small Llama."""
    directory = tmp_path_factory.mktemp("good")
    write_run(directory / "run", GQAConfig(num_query_heads=4, **HEADS), tie_embeddings=False)
    export_hf(open_model(directory / "run"), directory / "out")
    return directory / "out"


@pytest.fixture
def gqe(tmp_path, good, capsys):
    """gqe("import ...") → (exit code, standard error); {} is a temporary folder, with a copy of the good one."""
    shutil.copytree(good, tmp_path / "from")

    def call(line="import --from {}/from --run {}/run"):
        code = cli.main(line.replace("{}", str(tmp_path)).split())
        return code, capsys.readouterr().err

    return call


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "-"}))


BAD_CONFIGS = [
    ({"model_type": "gpt2"}, "model_type='gpt2' cannot be imported"),
    ({"model_type": "-"}, "model_type=None cannot be imported"),
    ({"model_type": "llamma"}, "cannot be imported (did you mean 'llama'?): Llama (SmolLM too), Mistral, Qwen2, Qwen3"),
    ({"hidden_size": "-", "vocab_size": "-"}, "config.json lacks vocab_size, hidden_size: copy it again"),
    ({"hidden_size": "32"}, "config.json: hidden_size='32' must be a whole number from 1 to 2147483647: copy"),
    ({"num_key_value_heads": 3}, "num_query_heads=4 is not a multiple of num_kv_heads=3"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": []}, "mlp_bias": True, "hidden_act": "gelu"},
     "asks for what the model here does not have: hidden_act='gelu' (the MLP is SwiGLU, with silu); mlp_bias=True (the "
     "MLP has no biases); rope_type='longrope' (known: default, linear, dynamic, llama3, yarn)"),
    ({"rope_scaling": {"type": "linear"}}, "rope_type='linear' without factor"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate=False (yarn's bounds"),
    ({"rope_parameters": {"full": {"rope_type": "default"}}}, "rope_parameters of its own for each kind of layer"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 (rotary embedding turns whole"),
    ({"quantization_config": {"bits": 4}}, "quantised weights are not read"),
    ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
     "layer_types of several kinds (full_attention, sliding_attention; all layers here are alike)"),
    ({"model_type": "gqe"}, "config.json lacks router_top_k, variant, router_kind"),
    ({"vocab_size": 250}, "has ids up to 258, but the model's vocabulary has vocab_size=250: give the tokenizer that"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD_CONFIGS, ids=[str(changes)[:40] for changes, _ in BAD_CONFIGS])
def test_configurations_that_cannot_be_used(gqe, tmp_path, changes, message):
    """Everything that does not fit in one line, exit code 2; no run appears."""
    change_config(tmp_path / "from", **changes)
    code, err = gqe()
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_all_tensors_that_do_not_fit_are_listed(gqe, tmp_path):
    """Missing, unexpected, misshaped, not floating point: at once, with file, shape found and shape expected."""
    path = tmp_path / "from" / "model.safetensors"
    state = load_file(path)
    del state["model.norm.weight"]
    state |= {
        "model.layers.1.mlp.up_proj.weight": np.zeros((32, 48), np.float32),
        "model.layers.0.self_attn.k_proj.weight": np.zeros((16, 32), np.int8),
        "model.layers.2.mlp.up_proj.weight": np.zeros((48, 32), np.float32),
    }
    save_file(state, path)
    code, err = gqe()
    assert code == 2
    assert sorted(err.splitlines()[1:]) == [
        "  model.layers.0.self_attn.k_proj.weight in model.safetensors: dtype I8, expected one of F64, F32, F16, BF16",
        "  model.layers.1.mlp.up_proj.weight in model.safetensors: shape [32, 48], expected [48, 32]",
        "  model.layers.2.mlp.up_proj.weight in model.safetensors: unexpected, of shape [48, 32]",
        "  model.norm.weight: missing, expected [32]",
    ]
    assert f"the tensors of {tmp_path}/from do not fit its configuration (4 problems)" in err


def test_a_router_that_learns_nothing_must_be_zero(tmp_path):
    """Else a "fixed" router's folder that was trained as a learned one would lose what it learned, in silence."""
    write_run(tmp_path / "run", GQEConfig(num_query_experts=4, **HEADS))
    export_hf(open_model(tmp_path / "run"), tmp_path / "out")
    change_config(tmp_path / "out", router_kind="fixed")
    with pytest.raises(ValueError, match=r"0\.self_attn\.router\.weight in .*: not zero, but .* router fixed has no"):
        import_folder(tmp_path / "out", tmp_path / "back")



def test_folders_that_cannot_be_used(gqe, tmp_path, good):
    """Each says what is wrong with which file, and what to do; exit code 2, and nothing is left of the run."""
    folder = tmp_path / "from"
    weights = (folder / "model.safetensors").read_bytes()
    index = json.dumps({"weight_map": {"model.norm.weight": "../../secret.safetensors"}}).encode()
    cases = [
        ({"config.json": None}, f"--from='{folder}' has no config.json: give a folder that gqe export or"),
        ({"config.json": b"{"}, "config.json is no JSON"),
        ({"config.json": b"[]"}, "config.json holds no JSON object"),
        ({"model.safetensors": weights[:-9]},
         f"cannot be read as a safetensors file (it is truncated: {len(weights) - 9} bytes, {len(weights)} expected)"),
        ({"model.safetensors": None}, "holds neither model.safetensors nor"),
        ({"model.safetensors": None, "pytorch_model.bin": b"x"}, "has its weights as a pickle (pytorch_model.bin)"),
        ({"model.safetensors": None, "model.safetensors.index.json": index}, "names '../../secret.safetensors', but a"),
        ({"bytes.json": None, "tokenizer.json": None}, "has no tokenizer that can be read"),
        ({"bytes.json": None, "tokenizer.json": b"{"}, "cannot be read as a Hugging Face tokenizer.json"),
    ]  # fmt: skip
    for changes, message in cases:
        shutil.rmtree(folder)
        shutil.copytree(good, folder)
        for name, content in changes.items():
            (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        code, err = gqe()
        assert code == 2 and message in err, (changes.keys(), err)
        assert [path.name for path in tmp_path.iterdir()] == ["from"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("import --from {}/nowhere --run {}/run", "--from='{}/nowhere' does not exist: give a folder that gqe export"),
        ("import --from {}/from/model.safetensors --run {}/run", "model.safetensors' is a file: give the folder with"),
        ("import --from {}/weights.pt --run {}/run", "weights.pt is a pickle, and unpickling runs whatever code is"),
        ("import --from {}/from --run {}/from", "--run='{}/from' exists and is not an empty folder"),
        ("import --from {}/from --run {}/run --tokenizer {}/none.model", "none.model' is neither 'bytes' nor an"),
        ("import --from {}/from --run {}/run --pattern x.{layer}.", "--pattern needs --config: --pattern says which"),
        ("import --from {}/from --run {}/run --config smoke", "--config needs --pattern: --pattern says which"),
        ("import --from {}/from --run {}/run --config smoke --pattern x.", "must have {layer} in it once, where the"),
        ("import --from {}/no --run {}/run --config smoke --pattern x.{layer}.", "is no safetensors file, nor a"),
        ("import --from {}/weights.pt --run {}/run --config smoke --pattern x.{layer}.", "weights.pt is a pickle"),
        ("import --from {}/from --run {}/run --config smoke --pattern x.{layer}.",
         "fits no tensor of {}/from: correct it (its names are model.embed_tokens.weight, "),
        ("import --from {}/from --run {}/run --config smoke --pattern model.layers.{layer}.self_attn.",
         "model.layers.3.self_attn.k_proj.weight: missing, expected [128, 192]"),
    ],
)  # fmt: skip
def test_command_lines_that_cannot_be_used(gqe, tmp_path, line, message):
    """Which option, why, and what to give instead."""
    (tmp_path / "weights.pt").write_bytes(b"")
    code, err = gqe(line)
    assert code == 2 and message.replace("{}", str(tmp_path)) in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from", "weights.pt"]


def test_full_disk(gqe, tmp_path, monkeypatch):
    """The run's directory appears whole or not at all, with the reason on one line and exit code 1."""
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        code, err = gqe()
    assert code == 1 and f"could not write {tmp_path}/run: it takes" in err

    def fail(*args, **options):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", fail)
    code, err = gqe()
    assert code == 1 and "No space left on device; nothing is left behind" in err and err.count("\n") == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ["from"]
