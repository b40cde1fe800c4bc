"""`gqe export`: a checkpoint as a folder that Hugging Face's transformers loads, or as the attention layers alone."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from gqe_jax.config_dict import to_dict
from gqe_jax.pytorch.folder import new_folder
from gqe_jax.pytorch.hf_config import CODE_FILES, check_exportable, choose_class, to_hf, token_ids
from gqe_jax.pytorch.hf_tokenizer import tokenizer_files
from gqe_jax.pytorch.model import to_write
from gqe_jax.pytorch.model_card import model_card
from gqe_jax.pytorch.names import ATTENTION_PREFIX
from gqe_jax.pytorch.safetensors_io import MAX_SHARD_SIZE, Tensor, write_files, write_weights
from gqe_jax.runs.saved_model import SavedModel

LAYERS_FILE = "attention.safetensors"
LAYERS_CONFIG_FILE = "layers.json"
LAYER_PREFIX = "layers.{layer}."


def export_hf(
    saved: SavedModel, out: str | Path, *, dtype: str | None = None, max_shard_size: int = MAX_SHARD_SIZE
) -> str:
    """Writes a folder for transformers: weights, configuration, tokenizer, model card, code where it is needed.

    Args:
      saved: from `open_model`.
      out: the folder to make.
      dtype: "float32" or "bfloat16"; None: as the parameters are.
      max_shard_size: bytes of a weights file, above which there are several.

    Returns:
      Which class computes the model, and why.

    Raises:
      ConfigError: `out` exists.
      OSError: it cannot be written; nothing is left then.
    """
    model, tokenizer = saved.config.model, saved.tokenizer
    dtype = dtype or model.param_dtype
    family, why = choose_class(model, tokenizer)
    config = to_hf(model, family, dtype, tokenizer)
    zero_biases = config["attention_bias"] and family is None
    tensors = to_write(model, _reader(saved), jnp.dtype(dtype), zero_biases=zero_biases)
    with new_folder(out, "--out", _bytes(tensors)) as folder:
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", token_ids(tokenizer))
        for name, content in tokenizer_files(tokenizer, model.context).items():
            (folder / name).write_bytes(content)
        if family is None:
            code = importlib.resources.files("gqe_jax.pytorch.modelling")
            for name in CODE_FILES:
                (folder / name).write_bytes((code / name).read_bytes())
        card = model_card(saved, Path(out).name, dtype=dtype, why=why, needs_code=family is None)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_weights(folder, tensors, max_shard_size)
    return why


def export_layers(saved: SavedModel, out: str | Path, *, dtype: str | None = None) -> None:
    """Writes the attention layers under the public `gqe` package's names, `layers.<i>.<name>`, into one file, and
    beside it, in `layers.json`, the configuration that they belong to.

    Arguments and what is raised as in `export_hf`.
    """
    model = saved.config.model
    check_exportable(model.attention)
    begins = {ATTENTION_PREFIX.format(layer=i): LAYER_PREFIX.format(layer=i) for i in range(model.num_layers)}
    tensors = []
    for tensor in to_write(model, _reader(saved), None if dtype is None else jnp.dtype(dtype)):
        for begin, own in begins.items():
            if tensor.name.startswith(begin):
                tensors.append(tensor._replace(name=own + tensor.name.removeprefix(begin)))
    with new_folder(out, "--out", _bytes(tensors)) as folder:
        write_files({folder / LAYERS_FILE: tensors})
        description = {"num_layers": model.num_layers, "d_model": model.d_model, "attention": to_dict(model.attention)}
        _write_json(folder / LAYERS_CONFIG_FILE, description)


def _reader(saved: SavedModel) -> Callable[[str], np.ndarray]:
    # Tensors are written source by source: what is made of one parameter, or of two, is made before the next is read.
    return functools.lru_cache(maxsize=2)(saved.read)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
