"""Options that several verbs have."""

import argparse

from gqe_jax.configs import shipped_configs


def add_config(
    parser: argparse.ArgumentParser,
    *,
    purpose: str = "configuration",
    required: bool = True,
    default: str | None = None,
) -> None:
    """Adds --config; purpose: what its help begins with."""
    parser.add_argument(
        "--config",
        required=required,
        default=default,
        metavar="FILE[:ARG]",
        help=f"{purpose}: a Python file with get_config(arg), or the name of one that comes with gqe_jax: "
        f"{', '.join(shipped_configs())}" + ("" if default is None else f" (default: {default})"),
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds --run and --step, which name a checkpoint."""
    parser.add_argument("--run", required=True, metavar="DIR", help="directory of the run")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to use (default: the newest)")


def add_mesh(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds --mesh."""
    parser.add_argument(
        "--mesh",
        default=default,
        metavar="AXIS=N,...",
        help="how many devices along data, fsdp, expert and context; -1: what is left (default: %(default)s)",
    )
