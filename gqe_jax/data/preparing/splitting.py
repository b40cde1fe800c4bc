"""Which part of a document is for training and which is held out."""

from __future__ import annotations

import dataclasses
import hashlib
import math

from gqe_jax.data.sources.corpus import Corpus
from gqe_jax.data.sources.files import Document

# With fewer expected held-out files than this, a hash of names could well hold out none of them, or far too much.
_FEWEST_HELDOUT_FILES = 8


def split_document(
    document: Document, rule: str, heldout_fraction: float, source_split: str | None = None
) -> dict[str, Document]:
    """Returns the document's part in each split ("train", "heldout"); a split it has no text for is left out.

    Rule "source": all goes to the split of the file that it comes from, `source_split`.
    Rule "document": the whole document goes to one split, by a hash of its name, whatever else the corpus holds.
    Rule "tail": its last lines are held out.
    """
    if rule == "source":
        parts = {source_split: document}
    elif rule == "document":
        fingerprint = int.from_bytes(hashlib.sha256(document.name.encode("utf-8", "surrogateescape")).digest()[:8])
        parts = {"heldout" if fingerprint < heldout_fraction * 2**64 else "train": document}
    else:
        cut = _tail_start(document.text, heldout_fraction)
        parts = {
            "train": dataclasses.replace(document, text=document.text[:cut]),
            "heldout": dataclasses.replace(document, text=document.text[cut:]),
        }
    return {split: part for split, part in parts.items() if part.text}


def split_rule(corpus: Corpus, heldout_fraction: float) -> str:
    """Returns the rule for `split_document`: "source" if the files know, else "document", or "tail" for few text
    files."""
    if any(file.split for file in corpus.files):
        return "source"
    few = len(corpus.files) * heldout_fraction < _FEWEST_HELDOUT_FILES
    return "tail" if few and heldout_fraction > 0 and not corpus.holds_records else "document"


def _tail_start(text: str, fraction: float) -> int:
    """Says where the last `fraction` of the text begins, moved back to the beginning of its line if it has lines."""
    cut = len(text) - math.ceil(len(text) * fraction)
    line = text.rfind("\n", 0, cut) + 1
    return line or cut
