"""Joins several processes into one run."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gqe_jax.config import ConfigError
from gqe_jax.processes.place import Place, socket_address
from gqe_jax.processes.roll_call import difference, meet


@contextlib.contextmanager
def joined(
    place: Place | None,
    config: Mapping[str, Any],
    directory: str | Path,
    *,
    timeout: float,
    report: Callable[[BaseException], int],
) -> Iterator[None]:
    """Gives JAX the devices of all processes inside the context; a process that fails there tells the others.

    To be entered before JAX has been asked for its devices. What leaves with an exception cannot end as Python does,
    for JAX then waits for all the others, which wait for it.

    Args:
      place: None: one process, and nothing happens.
      config: of the run, nested; must be equal everywhere.
      directory: of the run; must be one that all processes see.
      timeout: seconds within which all processes must have called.
      report: prints an exception and gives the exit code.

    Raises:
      ConfigError: versions, configurations or directories differ; every process raises the same. Or JAX is told to
        leave out what the processes need to stop together.
      StartFailed: a process, or process 0, is missing.
    """
    if place is None:
        yield
        return
    if not jax.config.jax_enable_preemption_service:  # pyright: ignore[reportAttributeAccessIssue]
        raise ConfigError(
            "JAX_ENABLE_PREEMPTION_SERVICE=false leaves out the service through which the processes of a run agree on "
            "the step at which they stop: unset it, or start one process"
        )
    host = place.listening_host
    peers = meet(place, config, directory, timeout)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            place.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=round(timeout),
            coordinator_bind_address=None if host is None else socket_address(host, place.address[1]),
        )
        yield
        peers.finish()
        jax.distributed.shutdown()
    except BaseException as error:
        peers.fail(error)
        code = report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        peers.wait_for_others()
        os._exit(code)


def every_text(text: str) -> list[str]:
    """Returns the text of every process, in their order; all have to ask together."""
    data = np.frombuffer(text.encode(), np.uint8)
    if jax.process_count() == 1:
        return [text]
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    rows = multihost_utils.process_allgather(np.pad(data, (0, max(lengths.max(), 1) - len(data))))
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def first_says(text: str) -> str:
    """Returns process 0's text on all processes, which must call together; for what a file or a clock says."""
    return every_text(text)[0]


def check_equal(what: str, text: str, remedy: str) -> None:
    """Raises ConfigError on all processes unless all have the same `text` of `what`."""
    if found := difference(what, dict(enumerate(every_text(text)))):
        raise ConfigError(f"the processes differ: {found}: {remedy}")
