"""`gqe import`: a PyTorch model's folder as a run that can be trained on, evaluated and sampled from."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from gqe_jax.checked_json import read_object
from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.config_dict import build
from gqe_jax.data.manifest import prepared_tokenizer
from gqe_jax.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from gqe_jax.models.transformer import Transformer
from gqe_jax.pytorch.exporting import LAYER_PREFIX, LAYERS_CONFIG_FILE, LAYERS_FILE
from gqe_jax.pytorch.folder import new_folder
from gqe_jax.pytorch.hf_config import CODE_FILES, PHI3, from_hf
from gqe_jax.pytorch.hf_tokenizer import CHAT_TEMPLATE, GENERATION, read_tokenizer
from gqe_jax.pytorch.model import TorchTensor, abstract_parameters, fill, parameter_bytes, torch_tensors
from gqe_jax.pytorch.names import ATTENTION_PREFIX, STACKED, split_fused
from gqe_jax.pytorch.safetensors_io import FLOATING, StoredTensor, read_file, read_folder, refuse_pickle
from gqe_jax.runs.checkpoint import least_bytes
from gqe_jax.runs.new_run import CONFIG_FILE, TOKENIZER, config_file, save_run
from gqe_jax.runs.state import initial_keys

# What folders hold beside the parameters: tables that can be computed, the head where it is tied to the embedding.
COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")
HEAD = "lm_head.weight"


def import_folder(
    source: str | Path,
    run: str | Path,
    *,
    tokenizer: str | None = None,
    dtype: str = "float32",
    allow_nonfinite: bool = False,
) -> RunConfig:
    """Makes a run of the model in a folder; its parameters are read tensor by tensor.

    Args:
      source: with config.json, safetensors and a tokenizer.
      run: the directory to make: a checkpoint of step 0, `config.py` to train on with, the tokenizer's files.
      tokenizer: file, or "bytes"; None: the folder's own.
      dtype: "float32" or "bfloat16", of the parameters. Training needs float32; generation computes in bfloat16 unless
        the folder's weights are float32.
      allow_nonfinite: take weights that are NaN or infinite as they are.

    Returns:
      The run's configuration.

    Raises:
      ConfigError: a folder that cannot be used, every tensor that does not fit, a tokenizer that does not, an existing
        run. Nothing is written then.
      OSError: the run cannot be written; nothing is left of it.
    """
    source, run = Path(source), Path(run)
    content = _read_config(source)
    model, attention = from_hf(content, source / "config.json")
    stored = read_folder(source)
    _check_sizes(model, attention, stored, source)
    if content["model_type"] == PHI3.model_type:
        stored = split_fused(stored, content)
    spoken = read_tokenizer(source) if tokenizer is None else load_tokenizer(tokenizer)
    wide = any(tensor.dtype in ("F32", "F64") for name, tensor in stored.items() if "embed" in name)
    model |= {"dtype": "float32" if wide else "bfloat16", "param_dtype": dtype}
    spec = "bytes" if isinstance(spoken, ByteTokenizer) else str(run / TOKENIZER / next(iter(spoken.files())))
    settings = {
        "name": run.name,
        "model": model | {"attention": attention},
        "data": {"batch_size": 8, "tokenizer": spec},
        "optimizer": {"learning_rate": 1e-5, "min_learning_rate": 1e-6},
    }
    try:
        config = build(settings)
    except ConfigError as error:
        raise ConfigError(f"{source / 'config.json'}, in this project's terms: {error}") from error
    _check_vocabulary(config, spoken, source if tokenizer is None else tokenizer)

    abstract = abstract_parameters(config.model)
    tensors = torch_tensors({path: leaf.shape for path, leaf in abstract.items()})
    extra = {name for name in stored if COMPUTED.fullmatch(name)}
    if config.model.tie_embeddings and HEAD in stored:
        _check_tied(stored, source)
        extra.add(HEAD)
    _check_fit(config, tensors, {name: tensor for name, tensor in stored.items() if name not in extra}, source)
    with new_folder(run, "--run", least_bytes(parameter_bytes(abstract))) as folder:
        arrays = _fill_finite(abstract, tensors, stored, source, allow_nonfinite)
        _check_buffers(config, arrays, source)
        save_run(folder, config, spoken, arrays)
        text = config_file("A model that gqe import read.", settings, SOURCE=str(source), RUN=str(run))
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    return config


def import_layers(
    source: str | Path,
    run: str | Path,
    config: RunConfig,
    *,
    pattern: str,
    tokenizer: str | None = None,
    allow_nonfinite: bool = False,
) -> RunConfig:
    """Makes a run of `config` whose attention layers come from a checkpoint that uses the package gqe.

    Args:
      source: a safetensors file, or a folder of them.
      run: the directory to make.
      config: of the run; its model's other parameters start as `config.train.seed` makes them.
      pattern: what stands before a layer's names, with `{layer}` for its number: "model.layers.{layer}.attn.".
      tokenizer: file, or "bytes"; None: that of `config.data`.
      allow_nonfinite: as in `import_folder`.

    Raises: as `import_folder`.
    """
    source = Path(source)
    if pattern.count("{layer}") != 1:
        raise ConfigError(f"--pattern={pattern!r} must have {{layer}} in it once, where the number of the layer stands")
    if source.is_dir():
        stored = read_folder(source)
    elif source.is_file():
        refuse_pickle(source)
        stored = read_file(source)
    else:
        raise ConfigError(f"--from={str(source)!r} is no safetensors file, nor a folder of them: correct the path")
    numbers = re.compile(re.escape(pattern).replace(r"\{layer\}", r"\d+") + ".*")
    stored = {name: tensor for name, tensor in stored.items() if numbers.fullmatch(name)}
    if not stored:
        raise ConfigError(f"--pattern={pattern!r} fits no tensor of {source}: correct it ({_some_names(source)})")
    if tokenizer is not None or config.data.path is None:
        spoken = load_tokenizer(tokenizer or config.data.tokenizer)
    else:
        spoken = prepared_tokenizer(config.data.path)
    _check_vocabulary(config, spoken, tokenizer or config.data.path or config.data.tokenizer)

    abstract = abstract_parameters(config.model)
    size = least_bytes(parameter_bytes(abstract))
    abstract = {path: leaf for path, leaf in abstract.items() if path.startswith(f"{STACKED}.attention.")}
    tensors = []
    for tensor in torch_tensors({path: leaf.shape for path, leaf in abstract.items()}):
        own = tensor.name.removeprefix(ATTENTION_PREFIX.format(layer=tensor.layer))
        tensors.append(dataclasses.replace(tensor, name=pattern.replace("{layer}", str(tensor.layer)) + own))
    _check_fit(config, tensors, stored, source)
    with new_folder(run, "--run", size) as folder:
        init_key, _ = initial_keys(config.train.seed)
        fresh = jax.jit(lambda: nnx.to_pure_dict(nnx.state(Transformer(config.model, rngs=nnx.Rngs(init_key)))))()
        fresh = {".".join(path): leaf for path, leaf in nnx.traversals.flatten_mapping(fresh).items()}
        read = _fill_finite(abstract, tensors, stored, source, allow_nonfinite)
        _check_buffers(config, read, source)
        save_run(folder, config, spoken, fresh | read)
    return config


# ---------------------------------------------------------------------------- checks


def _read_config(source: Path) -> dict[str, Any]:
    if source.is_file():
        refuse_pickle(source)
        raise ConfigError(
            f"--from={str(source)!r} is a file: give the folder with its config.json, or say with --pattern and "
            f"--config which attention layers to take from it"
        )
    if (source / LAYERS_CONFIG_FILE).is_file():
        raise ConfigError(
            f"--from={str(source)!r} holds attention layers alone, as gqe export --format gqe writes them: read them "
            f"into a whole model with --from {shlex.quote(str(source / LAYERS_FILE))} --pattern '{LAYER_PREFIX}' "
            f"--config FILE, the configuration that the run had"
        )
    path = source / "config.json"
    if not path.is_file():
        what = "has no config.json" if source.is_dir() else "does not exist"
        raise ConfigError(
            f"--from={str(source)!r} {what}: give a folder that gqe export or transformers' save_pretrained wrote, or "
            f"one downloaded from the Hub"
        )
    if (source / "adapter_config.json").is_file():
        raise ConfigError(
            f"{source} holds adapter_config.json, a LoRA that transformers adds to the model as it loads it: merge it "
            f"first (PEFT's merge_and_unload, then save_pretrained), or remove that file to import the model without it"
        )
    return read_object(path)


def _check_sizes(
    model: Mapping[str, Any], attention: Mapping[str, Any], stored: Mapping[str, StoredTensor], source: Path
) -> None:
    """Raises ConfigError if the configuration claims sizes that the weights cannot have: no work is done for them."""
    heads = attention.get("num_query_heads") or attention.get("num_query_experts")
    most = max((math.prod(tensor.shape) for tensor in stored.values()), default=0)
    claims = {
        "num_hidden_layers": (model["num_layers"], len(stored), "tensors"),
        "vocab_size": (model["vocab_size"], most, "numbers in its largest tensor"),
        "hidden_size": (model["d_model"], most, "numbers in its largest tensor"),
        "intermediate_size": (model["d_ff"], most, "numbers in its largest tensor"),
        "num_attention_heads": (heads, most, "numbers in its largest tensor"),
        "num_key_value_heads": (attention["num_kv_heads"], most, "numbers in its largest tensor"),
        "head_dim": (attention.get("head_dim") or 1, most, "numbers in its largest tensor"),
        "kv_lora_rank": (attention.get("latent_dim", 1), most, "numbers in its largest tensor"),
        "qk_rope_head_dim": (attention.get("rope_dim", 1), most, "numbers in its largest tensor"),
    }
    for name, (claimed, there, what) in claims.items():
        if claimed > there:
            raise ConfigError(
                f"{source / 'config.json'}: {name}={claimed}, but the weights of {source} have {there} {what}: use the "
                f"configuration that belongs to them"
            )


def _check_tied(stored: Mapping[str, StoredTensor], source: Path) -> None:
    """Raises ConfigError if a head is there that is not the embedding, though the configuration ties the two."""
    head, embedding = stored[HEAD], stored.get("model.embed_tokens.weight")
    if embedding is None or head.dtype not in FLOATING or embedding.dtype not in FLOATING:
        return  # refused with the other tensors that do not fit
    if head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read(), equal_nan=True):
        raise ConfigError(
            f"{source / 'config.json'}: tie_word_embeddings=true, but {HEAD} in {head.file.name} differs from "
            f"model.embed_tokens.weight (transformers 5.23 and later use the head, earlier ones the embedding): set "
            f"tie_word_embeddings to false to keep the head, or remove it from the weights"
        )


def _fill_finite(
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    tensors: list[TorchTensor],
    stored: Mapping[str, StoredTensor],
    source: Path,
    allow_nonfinite: bool,
) -> dict[str, jax.Array]:
    """`fill`; raises ConfigError if a weight is NaN or infinite, unless that is allowed."""
    found: dict[str, int] = {}

    def look(name: str, value: np.ndarray) -> None:
        with np.errstate(over="ignore"):
            bad = value.size - np.count_nonzero(np.isfinite(value.astype(np.float32, copy=False)))
        if bad:
            found[name] = bad

    arrays = fill(abstract, tensors, stored, look)
    if found and not allow_nonfinite:
        most = sorted(found.items(), key=lambda item: -item[1])
        named = ", ".join(f"{name} ({count:,})" for name, count in most[:8])
        rest = f" and {len(most) - 8} more" if len(most) > 8 else ""
        raise ConfigError(
            f"{source}: {sum(found.values()):,} weights in {len(found)} tensors are NaN, infinite or beyond float32: "
            f"{named}{rest}; copy or download the folder again, or take them as they are with --allow-nonfinite"
        )
    return arrays


def _check_buffers(config: RunConfig, arrays: Mapping[str, jax.Array], source: Path) -> None:
    prefix = f"{STACKED}.attention."
    buffers = {path.removeprefix(prefix): x for path, x in arrays.items() if path.startswith(prefix)}
    fault = config.model.attention.buffer_fault(buffers)
    if fault is not None:
        raise ConfigError(f"{source}: {fault}: copy the folder again from where it came from")


def _check_vocabulary(config: RunConfig, tokenizer: Tokenizer, origin: object) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer of {origin} has ids up to {tokenizer.vocab_size - 1}, but the model's vocabulary has "
            f"vocab_size={config.model.vocab_size}: give the tokenizer that the model was trained with (--tokenizer)"
        )


def _check_fit(
    config: RunConfig, tensors: Iterable[TorchTensor], stored: Mapping[str, StoredTensor], source: Path
) -> None:
    """Raises ConfigError that lists every tensor that is missing, unexpected, of another shape or no floating point."""
    wanted = {tensor.name: tensor for tensor in tensors}
    zeros = config.model.attention.zero_tensors(config.model.d_model)
    problems = [f"{name}: missing, expected {list(wanted[name].shape)}" for name in wanted if name not in stored]
    for name, found in stored.items():
        where = f"{name} in {found.file.name}"
        shape = wanted[name].shape if name in wanted else None
        for zero, zero_shape in zeros.items():
            if shape is None and name.endswith(zero):
                shape = zero_shape
                if found.shape == shape and found.read().any():
                    settings = config.model.attention.summary
                    problems.append(f"{where}: not zero, but a layer with {settings} has no parameter for it")
        if shape is None:
            problems.append(f"{where}: unexpected, of shape {list(found.shape)}")
        elif found.shape != shape:
            problems.append(f"{where}: shape {list(found.shape)}, expected {list(shape)}")
        elif found.dtype not in FLOATING:
            problems.append(f"{where}: dtype {found.dtype}, expected one of {', '.join(FLOATING)}")
    if problems:
        raise ConfigError(
            f"the tensors of {source} do not fit its configuration ({len(problems)} problems); use the configuration "
            f"that belongs to them:\n  " + "\n  ".join(problems)
        )


def left_behind(source: Path) -> list[str]:
    """Returns what a Hugging Face folder holds that an import does not take along, though transformers heeds it."""
    found = []
    path = source / GENERATION
    if path.is_file():
        tokens = {"eos_token_id", "bos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
        options = {key: value for key, value in read_object(path).items() if key not in tokens and value is not None}
        if options:
            named = ", ".join(f"{key}={value!r}" for key, value in options.items())
            found.append(f"{GENERATION}'s {named[:300]} (gqe generate has options of its own)")
    code = sorted(file.name for file in source.glob("*.py") if file.name not in CODE_FILES)
    if code:
        found.append(
            f"code ({', '.join(code)[:300]}), which is never run: the model is computed as its model_type says"
        )
    if not (source / "tokenizer.json").is_file() and (source / CHAT_TEMPLATE).is_file():
        found.append(f"{CHAT_TEMPLATE}, since the tokenizer is no tokenizer.json")
    return found


def _some_names(source: Path) -> str:
    names = list(read_folder(source) if source.is_dir() else read_file(source))
    return f"its names are {', '.join(names[:4])} …" if names else "it holds none"
