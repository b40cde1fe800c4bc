"""`gqe plan`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from gqe_jax.cli.options import add_config
from gqe_jax.config import ConfigError
from gqe_jax.plan import MODES

if TYPE_CHECKING:
    from gqe_jax.plan import report
    from gqe_jax.plan.compile import Request

COMPILED = 2  # of what the search ranks first

EPILOG = """examples:
  gqe plan --config gqe_250m --topology v5e:4x4
  gqe plan --config gqe_8b --topology v5p:4x4x4 --search
  gqe plan --config gqe_8b --topology v6e:16x16 --slices 2 --config.mesh.data=2
  gqe plan --config gqe_8b --topology v6e:16x16 --mode decode --config.mesh.fsdp=1 --config.mesh.expert=4"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `gqe plan`."""
    parser.epilog = EPILOG
    add_config(parser)
    parser.add_argument("--topology", required=True, metavar="NAME", help="slice of TPUs: v5e:1x1, v5p:4x4x4, ...")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="that many of it, joined by the network")
    parser.add_argument("--mode", choices=MODES, default="train", help="which step (default: train)")
    parser.add_argument("--seq-len", type=int, metavar="N", help="tokens of a row (default: the model's context)")
    parser.add_argument("--batch-size", type=int, metavar="ROWS", help="of the global batch (default: the config's)")
    parser.add_argument("--hlo", metavar="FILE", help="write the compiled program there, to read its collectives")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--search",
        action="store_true",
        help=f"rank meshes, remat policies and numbers of microbatches by estimate, and compile the best {COMPILED}",
    )
    what.add_argument("--compare", choices=("gqa",), help="beside it the same model with all query heads attending")


def run(args: argparse.Namespace) -> int:
    """Prints the plan; returns 0 if it fits, 1 if it does not.

    Raises:
      ConfigError: what cannot be planned.
    """
    from gqe_jax.aot.topologies import topology
    from gqe_jax.config_files import load_config
    from gqe_jax.plan.compile import Request

    if not 1 <= args.slices <= 1024:
        raise ConfigError(f"--slices={args.slices} must lie in [1, 1024]: choose another number of slices")
    where = dataclasses.replace(topology(args.topology), slices=args.slices)
    config = load_config(args.config, args.overrides)
    request = Request(
        config=config,
        topology=where.name,
        mode=args.mode,
        batch_size=config.data.batch_size if args.batch_size is None else args.batch_size,
        seq_len=config.model.context if args.seq_len is None else args.seq_len,
    )
    for option, value in (("--batch-size", request.batch_size), ("--seq-len", request.seq_len)):
        if value < 1:
            raise ConfigError(f"{option}={value} must be at least 1: raise it")
    if args.hlo and (args.search or args.compare):
        raise ConfigError(f"--hlo={args.hlo} is for one program: drop it, or --search and --compare")
    if args.search:
        return _search(request)
    if args.compare:
        return _compare(request)
    plan = _plan(request)
    if plan is None:
        return 1
    if args.hlo:
        Path(args.hlo).write_text(plan.compiled.hlo)
    return 0


def _plan(request: Request) -> report.Plan | None:
    """Compiles and prints; None: it does not fit."""
    from gqe_jax.plan import report, search
    from gqe_jax.plan.compile import Compiled, compile_plan

    result = compile_plan(request)
    if isinstance(result, Compiled):
        plan = report.Plan(request, result)
        print(plan, flush=True)
        return plan
    print(report.out_of_memory(request, result), flush=True)
    if request.mode == "train":
        print(report.remedies(request, search.remedies(request, result.mesh)), flush=True)
    return None


def _search(request: Request) -> int:
    from gqe_jax.plan import report, search

    if request.mode != "train":
        raise ConfigError(f"--search ranks training steps: drop it, or --mode={request.mode}")
    ranked = search.search(request)
    print(report.ranking(request, ranked), flush=True)
    plans = []
    for candidate in ranked[:COMPILED]:
        print(f"\ncompiled: {candidate.overrides(request.config)}", flush=True)
        plans.append(_plan(candidate.request))
    return 0 if any(plans) else 1


def _compare(request: Request) -> int:
    from gqe_jax.plan import report
    from gqe_jax.plan.dense_twin import dense_twin

    twin = dataclasses.replace(request, config=dense_twin(request.config))
    plan = _plan(request)
    print(flush=True)
    plan_of_twin = _plan(twin)
    if plan is None or plan_of_twin is None:
        return 1
    print("\n" + report.comparison(plan, plan_of_twin))
    return 0
