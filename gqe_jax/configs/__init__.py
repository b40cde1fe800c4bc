"""This folder holds the configurations that come with gqe_jax: `gqe train --config NAME[:ARG]`."""

from pathlib import Path


def shipped_configs() -> dict[str, Path]:
    """Returns name → file of the configurations that come with gqe_jax."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("[!_]*.py"))}
