"""What general compressors make of a text: the bar for a language model's bits per byte."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterable

import numpy as np


def compression_baselines(texts: Iterable[str]) -> dict[str, float]:
    """Bits per byte of the texts (as UTF-8), each compressed on its own: sum of compressed sizes · 8 / sum of bytes.

    Returns `zlib` (level 9), `bz2` (9), `lzma` (.xz, preset 9 extreme) and `order0`: the entropy of the texts' own byte
    frequencies, H = -Σ_b p_b log2 p_b, which no model that sees bytes without context can beat. Raises ValueError if
    there is no byte.
    """
    compressors = {
        "zlib": lambda data: zlib.compress(data, 9),
        "bz2": lambda data: bz2.compress(data, 9),
        "lzma": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    sizes = dict.fromkeys(compressors, 0)
    counts = np.zeros(256, np.int64)
    for text in texts:
        data = text.encode("utf-8")
        counts += np.bincount(np.frombuffer(data, np.uint8), minlength=256)
        for name, compress in compressors.items():
            sizes[name] += len(compress(data))
    total = int(counts.sum())
    if total == 0:
        raise ValueError("the texts hold no byte: give the documents of a held-out split that is not empty")
    frequencies = counts[counts > 0] / total
    baselines = {name: size * 8 / total for name, size in sizes.items()}
    return baselines | {"order0": float(-(frequencies * np.log2(frequencies)).sum())}
