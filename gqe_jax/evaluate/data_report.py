"""`gqe inspect data`: what a prepared folder or a mixture holds, as text and as a picture."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from etils import epath

from gqe_jax.config import ConfigError
from gqe_jax.data.choices import SPLITS
from gqe_jax.data.manifest import Manifest, check_sizes, prepared_tokenizer
from gqe_jax.data.reading.mixture import quotas, read_mixture
from gqe_jax.data.reading.pipeline import PreparedRows
from gqe_jax.data.tokenizer import Tokenizer

_BAR = 40  # characters of the longest bar
_SAMPLED_ROWS = 20_000  # of a split, evenly spread, for the histogram
_TOKENS_AT_ONCE = 2**20  # read together
_SHOWN_TOKENS = 12  # at the beginning of a segment, and a third of it at its end


def describe(directory: Path) -> str:
    """Returns the manifest in lines. Raises ConfigError for a folder that is no prepared data set, or a damaged one."""
    manifest = Manifest.load(directory)
    check_sizes(directory, manifest.files + manifest.train.shards + manifest.heldout.shards)
    facts = {
        "source": f"{manifest.source}, {manifest.source_files:,} file(s), {manifest.source_bytes:,} bytes",
        "tokenizer": f"{manifest.tokenizer}, vocabulary {manifest.vocab_size:,}, eos {manifest.eos_id}, pad "
        f"{manifest.pad_id}, sha256 {manifest.tokenizer_digest[:12]}",
        "rows": f"{manifest.seq_len:,} tokens, packed by {manifest.packing}",
        "held out": f"{manifest.heldout_fraction:g} of the text, rule {manifest.split_rule!r}",
        "left out": f"{manifest.empty_documents:,} documents without text"
        + (f", {manifest.duplicates:,} whose text came before" if manifest.deduplicated else ""),
        "replaced": f"{manifest.replaced:,} invalid UTF-8 sequences by U+FFFD",
    }
    lines = [f"{name:10} {fact}" for name, fact in facts.items()]
    lines.append(f"{'':10} {'documents':>12} {'bytes':>16} {'words':>15} {'tokens':>16} {'rows':>12} padding  shards")
    for name in SPLITS:
        split = manifest.split(name)
        lines.append(
            f"{name:10} {split.documents:>12,} {split.bytes:>16,} {split.words:>15,} {split.tokens:>16,} "
            f"{split.rows:>12,} {manifest.padding(name):7.2%}  {len(split.shards):6,}"
        )
    return "\n".join(lines)


def show_row(batch: dict[str, np.ndarray], slot: int, tokenizer: Tokenizer) -> str:
    """Returns one row of a batch in lines: each segment with its place, and its first and last inputs as id→text."""
    ids, tokens = batch["segment_ids"][slot], batch["tokens"][slot]
    segments = int(ids.max())
    lines = [f"{len(ids):,} positions, {segments} segment(s), {int((ids == 0).sum()):,} of padding"]
    for number in range(1, segments + 1):
        places = np.flatnonzero(ids == number)
        inside = tokens[places]
        lines.append(f"  ┌ segment {number}: positions {places[0]:,} to {places[-1]:,}, {len(inside):,} tokens")
        shown = [_token_text(token, tokenizer) for token in inside[:_SHOWN_TOKENS]]
        if len(inside) > _SHOWN_TOKENS:
            end = inside[max(_SHOWN_TOKENS, len(inside) - _SHOWN_TOKENS // 3) :]
            shown += ["…"] * (len(inside) > _SHOWN_TOKENS + len(end)) + [_token_text(token, tokenizer) for token in end]
        lines.append(f"  │ {' '.join(shown)}")
        last = batch["targets"][slot, places[-1]]
        lines.append(f"  └ then {_token_text(last, tokenizer)}")
    return "\n".join(lines)


def _token_text(token: int, tokenizer: Tokenizer) -> str:
    if token == tokenizer.eos_id:
        return f"{token}→eos"
    return f"{token}→{tokenizer.decode([int(token)])!r}"


def segment_lengths(rows: PreparedRows) -> np.ndarray:
    """Lengths in tokens, int64 [n], of the segments of up to 20,000 rows, evenly spread over the split."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, _SAMPLED_ROWS).astype(np.int64))
    return np.concatenate([*_lengths(rows, chosen)])


def _lengths(rows: PreparedRows, chosen: np.ndarray) -> Iterator[np.ndarray]:
    together = max(1, _TOKENS_AT_ONCE // rows.manifest.seq_len)
    for begin in range(0, len(chosen), together):
        ids = rows.read(chosen[begin : begin + together])["segment_ids"]
        keys = (ids + np.arange(len(ids))[:, None] * (ids.shape[1] + 1))[ids > 0]
        yield np.unique(keys, return_counts=True)[1]


def histogram_edges(seq_len: int) -> list[int]:
    """First lengths of ranges that double, 1, 2, 4, ..., the last of them `seq_len` alone; and an end."""
    edges = [1]
    while edges[-1] * 2 < seq_len:
        edges.append(edges[-1] * 2)
    return [*edges, *({seq_len} - {1}), seq_len + 1]


def histogram(lengths: np.ndarray, seq_len: int) -> str:
    """Segments by length, in bars."""
    edges = histogram_edges(seq_len)
    counts = np.histogram(lengths, edges)[0]
    lines = [f"segments by length in tokens ({len(lengths):,} segments, mean {lengths.mean():,.1f})"]
    for first, stop, count in zip(edges[:-1], edges[1:], counts, strict=True):
        span = f"{first:,}-{stop - 1:,}" if stop - first > 1 else f"{first:,}"
        lines.append(f"  {span:>17} {count:>12,} {'█' * round(_BAR * count / counts.max())}".rstrip())
    return "\n".join(lines)


def write_png(lengths: np.ndarray, seq_len: int, path: str | Path) -> None:
    """Draws the histogram. Raises ConfigError without matplotlib, or where `path` cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"--png={str(path)!r} needs matplotlib, which is not installed ({error}): pip install 'gqe_jax[viz]', or "
            "leave --png out"
        ) from error
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths, bins=min(100, seq_len))
    axes.set(xlabel="tokens of a segment", ylabel="segments", yscale="log", xlim=(0, seq_len))
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ConfigError(f"--png={str(path)!r} cannot be written ({error.strerror}): choose another file") from error


def print_report(directory: str, *, split: str, rows: int, png: str | None) -> None:
    """Prints what a folder holds, of a set or of a mixture.

    Args:
      directory: the folder that `gqe prepare` wrote.
      split: "train" or "heldout", whose rows are shown.
      rows: how many of them are shown.
      png: file into which the lengths of a set are drawn; None: no picture.

    Raises:
      ConfigError: no prepared data, or damaged; a negative number of rows; a picture of a mixture.
    """
    if rows < 0:
        raise ConfigError(f"--rows={rows} must not be negative: give the number of rows to show")
    parts = read_mixture(epath.Path(directory))
    if parts is None:
        _print_set(Path(directory), split, rows, png)
        return
    if png is not None:
        raise ConfigError(f"--png draws one set, and {directory!r} is a mixture: name one of its folders")
    total = sum(quotas(parts))
    for part, quota in zip(parts, quotas(parts), strict=True):
        print(f"{part.path}: {quota / total:.4%} of the rows of the mixture\n")
        _print_set(Path(part.path), split, rows, None)
        print()


def _print_set(directory: Path, split: str, count: int, png: str | None) -> None:
    print(describe(directory))
    rows, tokenizer = PreparedRows(directory, split), prepared_tokenizer(directory)
    chosen = np.unique(np.linspace(0, len(rows) - 1, count).astype(np.int64))
    batch = rows.read(chosen)
    for slot, number in enumerate(chosen):
        print(f"\nrow {number:,} of {len(rows):,} ({split}): {show_row(batch, slot, tokenizer)}")
    lengths = segment_lengths(rows)
    print(f"\n{histogram(lengths, rows.manifest.seq_len)}")
    if png is not None:
        write_png(lengths, rows.manifest.seq_len, png)
        print(f"wrote {png}", file=sys.stderr)
