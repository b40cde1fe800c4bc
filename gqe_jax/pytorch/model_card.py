"""The README.md of an exported folder: data, tokens, configuration, metrics, and how to load it."""

from __future__ import annotations

from typing import Any

from gqe_jax import flops
from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.data.manifest import Manifest
from gqe_jax.runs.record import read_run
from gqe_jax.runs.saved_model import SavedModel

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- {tag}
- jax
---

# {title}

{summary}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder{remote})
model = AutoModelForCausalLM.from_pretrained(folder{remote}, dtype="auto")

prompt = tokenizer("The ", return_tensors="pt")  # with the token in front that every document begins with
output = model.generate(**prompt, max_new_tokens=50, do_sample=True, top_p=0.95)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

{loading}

## Training

{training}

## Results

{results}

## Configuration

{configuration}
"""


def model_card(saved: SavedModel, title: str, *, dtype: str, why: str, needs_code: bool) -> str:
    """Returns the text; what the run no longer tells (its data have moved, say) is left out or called unknown.

    Args:
      saved: the model.
      title: of the card and the folder.
      dtype: of the weights.
      why: which class computes the model.
      needs_code: whether that class comes in the folder.
    """
    attention = saved.config.model.attention
    parameters = flops.parameter_count(saved.config.model)["total"]
    return CARD.format(
        tag=attention.kind,
        title=title,
        folder=title,
        summary=f"A language model of {parameters:,} parameters. Attention: {attention.description}.",
        remote=", trust_remote_code=True" if needs_code else "",
        loading=f"Class: {why}.",
        training=_training(saved),
        results=_results(saved),
        configuration=_table({"dtype of the weights": dtype, **_configuration(saved.config)}),
    )


def _training(saved: SavedModel) -> str:
    config = saved.config
    if saved.step == 0:
        return "None yet: the weights were imported or are those of initialisation."
    seq_len, lines = config.model.context, []
    if config.data.path is None:
        lines.append(f"- data: the text of the running Python's standard library, tokenizer {config.data.tokenizer}")
    else:
        try:
            manifest = Manifest.load(config.data.path)
        except ConfigError:  # prepared data may well have been removed since
            lines.append(f"- data: `{config.data.path}`, which is not there any more")
        else:
            seq_len = manifest.seq_len
            lines.append(
                f"- data: {manifest.source} ({manifest.train.documents:,} documents, {manifest.train.bytes:,} bytes, "
                f"{manifest.train.tokens:,} tokens), tokenizer {manifest.tokenizer}"
            )
    rows = saved.step * config.data.batch_size
    lines.append(
        f"- {saved.step:,} steps of {config.data.batch_size} rows of {seq_len:,} tokens: {rows * seq_len:,} tokens"
    )
    optimizer = config.optimizer
    lines.append(
        f"- AdamW, schedule {optimizer.schedule}, peak learning rate {optimizer.learning_rate:g}, weight decay "
        f"{optimizer.weight_decay:g}, seed {config.train.seed}"
    )
    return "\n".join(lines)


def _results(saved: SavedModel) -> str:
    names = {
        "eval/loss": "held-out loss, nats per token",
        "eval/bits_per_byte": "held-out bits per byte",
        "loss": "training loss, nats per token",
    }
    rows: dict[str, Any] = {}
    for line in read_run(saved.run).metrics:
        if line["step"] <= saved.step:
            found = {what: f"{line[name]:.4f} (step {line['step']})" for name, what in names.items() if name in line}
            rows |= found
    return _table(rows) if rows else "No metrics were recorded."


def _configuration(config: RunConfig) -> dict[str, Any]:
    model, attention = config.model, config.model.attention
    return {
        "layers": model.num_layers,
        "width": model.d_model,
        "MLP width": model.d_ff,
        "vocabulary": model.vocab_size,
        "context": model.context,
        "head dimension": attention.head_dim,
        "query heads": attention.query_heads[1],
        "KV heads": attention.num_kv_heads,
        "rotary base": attention.rope_theta,
        "rotary scaling": attention.rope_scaling.kind,
        "tied embeddings": model.tie_embeddings,
        "attention": f"{attention.kind}: {attention.summary}",
    }


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
