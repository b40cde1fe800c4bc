"""What `gqe prepare` wrote, read back."""

import numpy as np

from gqe_jax.data.reading.pipeline import PreparedRows
from gqe_jax.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def all_files(directory) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def texts_of(directory, split: str) -> list[str]:
    """The documents of a split, read back from its rows: each segment, without the eos that it begins with."""
    rows = PreparedRows(directory, split)
    batch = rows.read(range(len(rows)))
    targets = batch["targets"][batch["mask"]]
    return [BYTES.decode(document) for document in np.split(targets, np.flatnonzero(targets == BYTES.eos_id) + 1)[:-1]]
