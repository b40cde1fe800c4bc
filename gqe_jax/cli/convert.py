"""`gqe convert`."""

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from gqe_jax.cli.options import add_mesh, add_run
from gqe_jax.config import ConfigError

EPILOG = """examples:
  gqe convert --run runs/llama --to gqa --num-kv-heads 2 --out runs/llama_kv2
  gqe convert --run runs/llama --to gqa --num-query-heads 8 --out runs/llama_sqa
  gqe convert --run runs/llama --to asym_gqa --num-kv-heads 2 --out runs/llama_asym
  gqe convert --run runs/llama --to gqe --top-k 1 --out runs/llama_gqe
  gqe convert --run runs/llama --to mla --latent 512 --rope-dim 64 --out runs/llama_mla

The run is one that gqe train or gqe import made of a dense model. The result is a run of step 0 that gqe train, eval,
generate and export take; docs/convert.md says which conversion is for what."""

# Option → the kinds that it is for.
OPTIONS = {
    "num_kv_heads": ("gqa", "asym_gqa"),
    "num_query_heads": ("gqa",),
    "pool": ("gqa",),
    "align": ("gqa", "asym_gqa"),
    "items": ("asym_gqa",),
    "equal": ("asym_gqa",),
    "max_group_size": ("asym_gqa",),
    "allocation": ("key_driven",),
    "top_k": ("gqe",),
    "experts": ("gqe",),
    "experts_per_group": ("gqe",),
    "reconstruct": ("gqe",),
    "exact": ("gqe", "mla"),
    "latent": ("mla",),
    "rope_dim": ("mla",),
    "freqfold": ("mla",),
    "tied_groups": ("mla",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `gqe convert`."""
    parser.epilog = EPILOG
    add_run(parser)
    kinds = ("gqa", "asym_gqa", "key_driven", "gqe", "mla")
    parser.add_argument("--to", required=True, choices=kinds, help="kind of attention to convert to")
    parser.add_argument("--out", required=True, metavar="DIR", help="run to make; must not exist, or be empty")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="prepared data: training rows to calibrate with, held-out rows to compare on (default: the run's)",
    )
    parser.add_argument("--calibration-rows", type=int, default=32, metavar="ROWS", help="default: %(default)s")
    parser.add_argument(
        "--heldout-rows",
        type=int,
        default=256,
        metavar="ROWS",
        help="that the losses are taken over; 0: all (default: %(default)s)",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of the source's training steps, for the new configuration (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of calibration rows and random weights (default: 0)")
    parser.add_argument("--no-refit", action="store_true", help="do not fit the output projections")
    add_mesh(parser, "data=-1")

    group = parser.add_argument_group("--to gqa: fewer KV heads, fewer query heads")
    group.add_argument(
        "--num-kv-heads", type=int, metavar="N", help="a divisor of the run's (default: the run's); asym_gqa: any"
    )
    group.add_argument(
        "--num-query-heads", type=int, metavar="N", help="to keep: equally many of each KV head's (default: all)"
    )
    group.add_argument("--pool", choices=("mean", "first", "random"), help="KV heads of a group (default: mean)")
    group.add_argument(
        "--align",
        action=argparse.BooleanOptionalAction,
        help="turn the KV heads of a group towards each other first (default: yes; asym_gqa too)",
    )

    group = parser.add_argument_group("--to asym_gqa: fewer KV heads, each in place of those that are most alike")
    group.add_argument(
        "--items",
        choices=("kv", "k", "v", "weights"),
        help="what KV heads are compared by: keys, values or both on calibration text, or weights (default: kv)",
    )
    group.add_argument("--equal", action="store_true", default=None, help="groups of equal size; the result is a gqa")
    group.add_argument(
        "--max-group-size", type=int, metavar="R", help="most query heads of a group (default: twice their mean number)"
    )

    group = parser.add_argument_group("--to key_driven: query heads by the norms of the keys, as training goes on")
    group.add_argument(
        "--allocation",
        choices=("kdgqa", "dgqa_ema", "dgqa_diff", "static"),
        help="by the last step's norms, their average, their change, or once on calibration rows (default: kdgqa)",
    )

    group = parser.add_argument_group("--to gqe: Grouped Query Experts")
    group.add_argument("--top-k", type=int, metavar="K", help="experts selected in each KV group (default: 1)")
    group.add_argument(
        "--experts",
        choices=("copies", "own"),
        help="copies of the best head of each group, or the group's own heads (default: copies where --top-k is 1)",
    )
    group.add_argument("--experts-per-group", type=int, metavar="M", help="copies (default: the group's query heads)")
    group.add_argument(
        "--reconstruct", type=int, metavar="STEPS", help="of training each layer towards the dense one's (default: 0)"
    )
    group.add_argument(
        "--exact",
        action="store_true",
        default=None,
        help="the dense function itself: all heads selected by a fixed router, or copies of an MHA's heads; --to mla: "
        "all of the rotary embedding kept",
    )

    group = parser.add_argument_group("--to mla: multi-head latent attention")
    group.add_argument("--latent", type=int, metavar="R", help="numbers of the latent (default: 512)")
    group.add_argument(
        "--rope-dim", type=int, metavar="R", help="dimensions that keep the rotary embedding (default: 64)"
    )
    group.add_argument(
        "--freqfold",
        type=_freqfold,
        metavar="F",
        help="neighbouring frequencies taken for one, or auto: as many as serve best (default: auto)",
    )
    group.add_argument(
        "--tied-groups",
        action=argparse.BooleanOptionalAction,
        help="query heads of a KV head share their up-projections (default: yes)",
    )


def run(args: argparse.Namespace) -> int:
    """Converts, and says what came of it; returns the exit code 0. Raises as `convert_run`."""
    import functools

    from gqe_jax.convert.asym import HEADS, to_asym_gqa
    from gqe_jax.convert.converting import convert_run, loss_table
    from gqe_jax.convert.driven import to_key_driven
    from gqe_jax.convert.latent import to_mla
    from gqe_jax.convert.pool import to_gqa
    from gqe_jax.convert.upcycle import to_gqe
    from gqe_jax.parallel.mesh import make_mesh, parse_mesh
    from gqe_jax.runs.new_run import CONFIG_FILE
    from gqe_jax.runs.saved_model import open_model

    options = _options_of(args)
    if args.to != "mla":  # which draws nothing
        options["seed"] = args.seed
    if args.to == "asym_gqa":
        options["heads"] = lambda: open_model(args.run, args.step).read(HEADS)
    kinds = {"gqa": to_gqa, "asym_gqa": to_asym_gqa, "key_driven": to_key_driven, "gqe": to_gqe, "mla": to_mla}
    to = kinds[args.to]
    done = convert_run(
        args.run,
        args.out,
        functools.partial(to, **options),
        make_mesh(parse_mesh(args.mesh)),
        step=args.step,
        data=args.data,
        calibration_rows=args.calibration_rows,
        heldout_rows=args.heldout_rows,
        alpha=args.alpha,
        refit=not args.no_refit,
        seed=args.seed,
        progress=_Progress(),
    )
    for note in done.notes:
        print(f"note: {note}")
    print("layer  relative error of its attention's output")
    for index, (error, note) in enumerate(zip(done.converted.errors, done.converted.notes, strict=True)):
        print(f"{index:5}  {error:.4f}  {note}")
    print(loss_table(done.losses))
    attention, config = done.config.model.attention, done.config
    print(
        f"step {done.step} of {args.run} as {attention.kind} ({attention.summary}), written to {args.out}. "
        f"{config.train.steps:,} steps train it on:"
    )
    out = shlex.quote(args.out)
    print(f"  gqe train --config {shlex.quote(str(Path(args.out) / CONFIG_FILE))} --run {out}")
    return 0


def _options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of the kind that were given. Raises ConfigError for those of another kind."""
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    for name in given:
        if args.to not in OPTIONS[name]:
            option = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{option} says nothing of a conversion to {args.to}: leave it out, or use --to {OPTIONS[name][0]}"
            )
    if args.to == "gqa" and not {"num_kv_heads", "num_query_heads"} & given.keys():
        raise ConfigError("--to gqa needs to know how many heads are left: add --num-kv-heads or --num-query-heads")
    return given


def _freqfold(text: str) -> int | str:
    return text if text == "auto" else int(text)


class _Progress:
    """A bar on the terminal, or a line for each layer in a log: layers done, and the time left."""

    def __init__(self):
        self.began = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        from gqe_jax.data.preparing.progress import duration

        left = (time.monotonic() - self.began) / done * (total - done)
        bar = "#" * (20 * done // total)
        line = f"[{bar:<20}] layer {done} of {total}, {duration(left)} left"
        terminal = sys.stderr.isatty()
        sys.stderr.write(f"\r{line}\x1b[K" if terminal and done < total else "\r\x1b[K" if terminal else f"{line}\n")
        sys.stderr.flush()
