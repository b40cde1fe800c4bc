"""Batches from prepared rows, through grain: shuffled for training, in order for evaluation.

The global batch s is a pure function of (seed, position that the run went on from, s). A process reads only rows that
its devices hold a part of, so any number of processes sees the same global batches, and seeking to a step costs
nothing.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import re
import resource
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from gqe_jax.config import ConfigError
from gqe_jax.data.manifest import Manifest, check_sizes
from gqe_jax.data.reading.position import BEGINNING, Position
from gqe_jax.data.reading.prepared import PreparedData, PreparedSet
from gqe_jax.data.rows import decode_rows
from gqe_jax.processes.parent import end_with_parent

_THREADS = 2
_PREFETCHED_BATCHES = 8
_BATCHES_PER_WORKER = 2
_EXIT_CODE = re.compile(r"terminated unexpectedly with exit code (-?\d+)")  # as grain says it


class PreparedRows:
    """Random access to the rows of one split of a prepared data set. Picklable.

    Opening compares file sizes and record counts with the manifest; `manifest.verify` reads everything.
    """

    def __init__(self, directory: str | Path, split: str, skip: Collection[str] = ()):
        """skip: names of shards that are left out, as if they did not exist.

        Raises ConfigError if the data set is missing, damaged (naming the shards), or the split has no rows.
        """
        self.manifest = Manifest.load(directory)
        shards = [shard for shard in self.manifest.split(split).shards if shard.name not in skip]
        if not shards:
            raise ConfigError(
                f"data.path={str(directory)!r} has no {split} rows (it was prepared with --heldout "
                f"{self.manifest.heldout_fraction}): prepare it again with another --heldout"
            )
        check_sizes(directory, shards)
        self._paths = [Path(directory) / shard.name for shard in shards]
        self._ends = list(itertools.accumulate(shard.rows for shard in shards))
        self._open()
        for path, reader, shard in zip(self._paths, self._readers, shards, strict=True):
            if not reader.ok():
                path.open("rb").close()  # raises what is wrong, where it is not the shard
            if not reader.ok() or reader.num_records() != shard.rows:
                raise _damaged(path, f"its index does not give the {shard.rows} rows of the manifest")

    def _open(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY:  # each shard stays open
            wanted = soft + len(self._paths)
            wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        self._readers = [ArrayRecordReader(str(path), "readahead_buffer_size:0") for path in self._paths]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_readers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return self._ends[-1]

    def records(self, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        """Returns the records of these rows; an index of `len(self)` or more gives an empty one, which is a row of
        padding.

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
        return records

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Returns the batch of these rows (see `rows.decode_rows`). Raises as `records`."""
        return decode_rows(self.records(indices), self.manifest.seq_len, self.manifest.eos_id)


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"shard {path} is damaged ({why}): restore it from a copy, or delete the folder and prepare it again with "
        "`gqe prepare`"
    )


class Batches(Iterator[dict[str, np.ndarray]]):
    """An iterator over batches that are read ahead; close it, or use it as a context manager."""

    def __init__(self, read: Callable[[int], dict[str, np.ndarray]], start: int, stop: int, workers: int = 0):
        """read: batch number to batch. start, stop: the first batch given, the end.

        workers: processes that read, with a picklable `read`; 0: threads.
        """
        import grain

        self._copies = bool(workers)
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCHED_BATCHES)
        batches = grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options)
        if workers:
            _parse_absl_flags()
            options = grain.MultiprocessingOptions(workers, _BATCHES_PER_WORKER)
            batches = batches.mp_prefetch(options, worker_init_fn=_start_worker)
        self._iterator = iter(batches)

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            if not (code := _EXIT_CODE.search(str(error))):
                raise
            raise ChildProcessError(
                f"a process that reads data ended with exit code {code[1]}, perhaps for want of memory: start the same "
                f"command again, which goes on from the last checkpoint, or set data.workers lower (0: threads read)"
            ) from error
        # What comes from another process lies in shared memory, which is handed back when the next batch is asked for.
        return {name: np.array(rows) for name, rows in batch.items()} if self._copies else batch

    def close(self) -> None:
        """Stops what reads ahead."""
        self._iterator.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _start_worker(index: int, count: int) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process decides


def _parse_absl_flags() -> None:
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain's processes read their settings there
        flags.FLAGS.mark_as_parsed()


def train_batches(
    data: PreparedData,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    position: Position | None = None,
    rows: Sequence[int] | None = None,
    workers: int = 0,
) -> Batches:
    """Endless training batches, from that of step `start_step` on.

    Args:
      data: one prepared set, or a mixture.
      batch_size: rows of the global batch. Every epoch of a set holds each of its rows once, in an order of its own;
        batches go on across the end of an epoch. The sets of a mixture take turns by `mixture.MixtureSchedule`.
      seed: of the order, in [0, 2**32).
      position: what was read before the batch of `start_step`; None: `start_step` batches of this size.
      rows: which rows of each global batch to read (`parallel.mesh.local_rows`); None: all.
      workers: processes that read; 0: threads of this one.

    Returns an iterator of dicts of arrays [number of rows, S] (see `rows.decode_rows`).
    Raises ConfigError for data that is missing or damaged, or a batch_size below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"data.batch_size={batch_size} must be at least 1: raise it")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"data.seed={seed} must lie in [0, 2**32): choose another seed")
    if position is None:
        position = BEGINNING.after(data, start_step * batch_size)
    slots = range(batch_size) if rows is None else rows
    batch = TrainingBatch(TrainingStream(data, seed, position), batch_size, slots)
    return Batches(batch, 0, sys.maxsize // batch_size, workers)


class TrainingStream:
    """The endless stream of training rows of a set or a mixture from a position on; any row is looked up at once."""

    def __init__(self, data: PreparedData, seed: int, start: Position = BEGINNING):
        self.rows = [PreparedRows(part.directory, "train", part.damaged) for part in data.sets]
        start = start.on(data)
        known = [start.sets[part.digest] for part in data.sets]
        self._schedule, self._turn = data.schedule, start.turn
        self._first = np.array([part.rows for part in known]) - self._schedule.given(start.turn)
        self._orders = [EpochOrder(len(rows), seed, part.order) for rows, part in zip(self.rows, known, strict=True)]

    def __getitem__(self, number: int) -> tuple[int, int]:
        """(number of the set, number of the row in it) of a row of the stream."""
        chosen, draw = self._schedule[self._turn + number]
        return chosen, self._orders[chosen][int(self._first[chosen]) + draw]

    def read(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns the batch of these rows of the stream."""
        places = [self[number] for number in numbers]
        records = [b""] * len(places)
        for number, rows in enumerate(self.rows):
            slots = [slot for slot, (chosen, _) in enumerate(places) if chosen == number]
            for slot, record in zip(slots, rows.records([places[slot][1] for slot in slots]), strict=True):
                records[slot] = record
        manifest = self.rows[0].manifest
        return decode_rows(records, manifest.seq_len, manifest.eos_id)


@dataclasses.dataclass(frozen=True)
class TrainingBatch:
    """Returns, by the number of steps since the stream's beginning, the rows at `slots` of the global batch."""

    stream: TrainingStream
    batch_size: int
    slots: Sequence[int]

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        return self.stream.read([step * self.batch_size + slot for slot in self.slots])


class EpochOrder:
    """The endless shuffled order: position p is row `order[p]`; each epoch of `num_rows` positions has each row once.

    Every epoch has a permutation of its own, evaluated point by point (no table is held), and independent of the
    epochs of other seeds and of the other sets (`stream`) of a mixture.
    """

    def __init__(self, num_rows: int, seed: int, stream: int = 0):
        self._num_rows = num_rows
        self._seed, self._stream = seed, stream

    def __getitem__(self, position: int) -> int:
        from grain.experimental import index_shuffle

        epoch, index = divmod(position, self._num_rows)
        seed = _epoch_seed(self._seed, epoch, self._stream)
        return index_shuffle(index, max_index=self._num_rows - 1, seed=seed, rounds=4)


@functools.lru_cache(maxsize=256)
def _epoch_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def heldout_batches(data: PreparedSet, batch_size: int, chosen: Sequence[int] | None = None) -> Batches:
    """Returns the held-out rows in order, once, in global batches of `batch_size`; of each the rows `chosen` (None:
    all).

    The last batch is filled up with rows of padding (mask False), so every token counts exactly once and all processes
    get equally many batches. Raises as `train_batches`.
    """
    chosen = range(batch_size) if chosen is None else chosen
    rows = PreparedRows(data.directory, "heldout", data.damaged)
    num_batches = -(-len(rows) // batch_size)
    return Batches(lambda number: rows.read([number * batch_size + i for i in chosen]), 0, num_batches)


def check_readable(data: PreparedData) -> None:
    """Opens all that training and evaluation will read. Raises as `train_batches`, before anything depends on it."""
    for part in data.sets:
        for split in ("train", "heldout"):
            PreparedRows(part.directory, split, part.damaged)
