"""`gqe train`."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import TYPE_CHECKING

from gqe_jax.cli.errors import report
from gqe_jax.cli.options import add_config
from gqe_jax.config import ConfigError

if TYPE_CHECKING:
    from gqe_jax.processes.place import Place

EPILOG = """example:
  gqe train --config smoke:steps=200 --run runs/short --config.train.log_every=10

--config.a.b=VALUE overrides any field of the configuration. A run that exists is continued from its newest
checkpoint. On several machines, start the same command on each, with --distributed or --coordinator."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `gqe train`."""
    parser.epilog = EPILOG
    add_config(parser)
    parser.add_argument("--run", required=True, metavar="DIR", help="directory of the run: metrics and checkpoints")
    parser.add_argument(
        "--previous-checkpoint",
        action="store_true",
        help="if the newest checkpoint is damaged, set it aside and continue from the newest one that is whole",
    )
    several = parser.add_argument_group("several processes, each started with the same command")
    several.add_argument(
        "--distributed", action="store_true", help="which they are, the platform says: Cloud TPU, GKE, Slurm, Open MPI"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="or by hand: where process 0 is reached")
    several.add_argument("--num-processes", type=int, metavar="N", help="with --coordinator: how many")
    several.add_argument("--process-id", type=int, metavar="I", help="with --coordinator: this one, from 0")
    several.add_argument(
        "--start-timeout", type=float, default=1200.0, metavar="SECONDS", help="for all to have started (default: 1200)"
    )


def run(args: argparse.Namespace) -> int:
    """Trains; returns the exit code."""
    from gqe_jax.config_dict import to_dict
    from gqe_jax.config_files import load_config
    from gqe_jax.processes.joined import joined
    from gqe_jax.runs.directory import check_directory
    from gqe_jax.train.loop import Interrupted, train

    config = load_config(args.config, args.overrides)
    check_directory(args.run)
    place = place_from(args)
    who = "gqe train" if place is None else f"gqe train, process {place.process_id} of {place.num_processes}"
    with joined(place, to_dict(config), args.run, timeout=args.start_timeout, report=functools.partial(report, who)):
        try:
            train(config, args.run, previous_checkpoint=args.previous_checkpoint)
        except Interrupted as stop:
            print(f"{who}: {stop}; the same command continues it", file=sys.stderr)
            return 128 + stop.signal_number
    if place is not None and place.process_id != 0:
        return 0
    print(f"\ncheckpoints: {args.run}/checkpoints   metrics: {args.run}/metrics.jsonl")
    print("next: " + "   |   ".join(f"gqe {verb} --run {args.run}" for verb in ("eval", "generate", "inspect run")))
    return 0


def place_from(args: argparse.Namespace) -> Place | None:
    """This process's place as the arguments give it; None: there is one process.

    Raises:
      ConfigError: the arguments contradict one another, or some are missing.
      StartFailed: as `find_place`.
    """
    from gqe_jax.processes.place import Place, find_place

    by_hand = {
        f"--{name.replace('_', '-')}": getattr(args, name) for name in ("coordinator", "num_processes", "process_id")
    }
    given = [name for name, value in by_hand.items() if value is not None]
    if args.start_timeout <= 0:
        raise ConfigError(f"--start-timeout={args.start_timeout} must be above 0 seconds")
    if args.distributed and given:
        raise ConfigError(
            f"--distributed asks the platform for what {' and '.join(given)} say by hand: give one or the other"
        )
    if args.distributed:
        return find_place(args.start_timeout)
    if given and len(given) < 3:
        missing = [name for name in by_hand if name not in given]
        raise ConfigError(
            f"{' and '.join(given)} without {' and '.join(missing)}: several processes need --coordinator HOST:PORT "
            f"--num-processes N --process-id I, or --distributed where the platform knows them"
        )
    return Place(args.coordinator, args.num_processes, args.process_id) if given else None
