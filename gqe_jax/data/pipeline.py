"""Batches from prepared rows, through grain: shuffled for training, in order for evaluation.

The global batch s is a pure function of (seed, s). A process reads only its own rows, a contiguous slice of each global
batch, so any number of processes sees the same global batches, and seeking to a step costs nothing.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from gqe_jax.config import ConfigError
from gqe_jax.data.manifest import Manifest, check_sizes
from gqe_jax.data.rows import decode_rows

_THREADS = 2
_PREFETCHED_BATCHES = 8


class PreparedRows:
    """Random access to the rows of one split of a prepared data set.

    Opening compares file sizes and record counts with the manifest; `manifest.verify` reads everything.
    """

    def __init__(self, directory: str | Path, split: str):
        """Raises ConfigError if the data set is missing, damaged (naming the shards), or the split has no rows."""
        self.manifest = Manifest.load(directory)
        shards = self.manifest.split(split).shards
        if not shards:
            raise ConfigError(
                f"data.path={str(directory)!r} has no {split} rows (it was prepared with --heldout "
                f"{self.manifest.heldout_fraction}): prepare it again with another --heldout"
            )
        check_sizes(directory, shards)
        self._paths = [Path(directory) / shard.name for shard in shards]
        self._readers = [ArrayRecordReader(str(path), "readahead_buffer_size:0") for path in self._paths]
        for path, reader, shard in zip(self._paths, self._readers, shards, strict=True):
            if not reader.ok() or reader.num_records() != shard.rows:
                raise _damaged(path, f"its index does not give the {shard.rows} rows of the manifest")
        self._ends = list(itertools.accumulate(shard.rows for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The batch of these rows (see `rows.decode_rows`); an index of `len(self)` or more gives a row of padding.

        Raises ConfigError that names the shard if a row cannot be read. Safe to call from several threads.
        """
        records = [b""] * len(indices)
        by_shard: dict[int, list[int]] = {}
        for slot, index in enumerate(indices):
            if index < len(self):
                by_shard.setdefault(bisect.bisect_right(self._ends, index), []).append(slot)
        for shard, slots in by_shard.items():
            first = self._ends[shard - 1] if shard else 0
            try:
                found = self._readers[shard].read([int(indices[slot]) - first for slot in slots])
            except (RuntimeError, IndexError, ValueError) as error:
                raise _damaged(self._paths[shard], str(error)) from error
            for slot, record in zip(slots, found, strict=True):
                records[slot] = record
        return decode_rows(records, self.manifest.seq_len)


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"shard {path} is damaged ({why}): restore it from a copy, or delete the folder and prepare it again with "
        "`gqe prepare`"
    )


class Batches(Iterator[dict[str, np.ndarray]]):
    """An iterator over batches that are read ahead by threads; close it, or use it as a context manager.

    Attributes:
      rows: the rows it draws from; `rows.manifest` says what they are.
    """

    def __init__(self, rows: PreparedRows, row_indices: Callable[[int], Sequence[int]], start: int, stop: int):
        """row_indices: batch number to the numbers of its rows. start, stop: the first batch given, the end."""
        import grain

        self.rows = rows
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCHED_BATCHES)
        batches = grain.MapDataset.range(start, stop).map(lambda number: rows.read(row_indices(number)))
        self._iterator = iter(batches.to_iter_dataset(options))

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def close(self) -> None:
        """Stops the reading threads."""
        self._iterator.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def train_batches(
    directory: str | Path,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Endless training batches, from that of step `start_step` on: this process's rows of each global batch.

    Args:
      directory: made by `prepare`.
      batch_size: rows of the global batch. Every epoch holds each row once, in an order of its own; batches go on
        across the end of an epoch.
      seed: of the order, in [0, 2**32).

    Returns an iterator of dicts of arrays [batch_size / process_count, S] (see `rows.decode_rows`).
    Raises ConfigError for data that is missing or damaged, or a batch_size that the processes cannot share.
    """
    mine = _share(batch_size, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise ConfigError(f"data.seed={seed} must lie in [0, 2**32): choose another seed")
    rows = PreparedRows(directory, "train")
    order = EpochOrder(len(rows), seed)
    last = sys.maxsize // batch_size
    return Batches(rows, lambda step: [order[step * batch_size + i] for i in mine], start_step, last)


class EpochOrder:
    """The endless shuffled order: position p is row `order[p]`; each epoch of `num_rows` positions has each row once.

    Every epoch has a permutation of its own, evaluated point by point (no table is held), and independent of the
    epochs of other seeds.
    """

    def __init__(self, num_rows: int, seed: int):
        from grain.experimental import index_shuffle

        self._num_rows = num_rows
        self._shuffle = functools.partial(index_shuffle, max_index=num_rows - 1, rounds=4)
        self._epoch_seed = functools.lru_cache(maxsize=16)(
            lambda epoch: int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
        )

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self._num_rows)
        return self._shuffle(index, seed=self._epoch_seed(epoch))


def heldout_batches(directory: str | Path, batch_size: int, process_index: int = 0, process_count: int = 1) -> Batches:
    """The held-out rows in order, once: this process's rows of each global batch of `batch_size`.

    The last batch is filled up with rows of padding (mask False), so every token counts exactly once and all processes
    get equally many batches. Raises as `train_batches`.
    """
    mine = _share(batch_size, process_index, process_count)
    rows = PreparedRows(directory, "heldout")
    num_batches = -(-len(rows) // batch_size)
    return Batches(rows, lambda number: [number * batch_size + i for i in mine], 0, num_batches)


def _share(batch_size: int, process_index: int, process_count: int) -> range:
    """The slots of a global batch that this process reads."""
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index={process_index} must lie in [0, process_count={process_count})")
    if batch_size < 1 or batch_size % process_count:
        raise ConfigError(
            f"data.batch_size={batch_size} is no positive multiple of the number of processes ({process_count}), of "
            f"which each reads an equal share: set it to a multiple of {process_count}"
        )
    local = batch_size // process_count
    return range(process_index * local, (process_index + 1) * local)
