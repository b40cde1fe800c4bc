"""This folder holds the configurations and the studies that come with gqe_jax.

`gqe train --config NAME[:ARG]` takes a configuration, `gqe study run NAME:SIZE` a study.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent


def shipped_configs() -> dict[str, Path]:
    """Returns name → file of the configurations that come with gqe_jax."""
    return {path.stem: path for path in sorted(_FOLDER.glob("[!_]*.py"))}


def shipped_studies() -> dict[str, Path]:
    """Returns NAME:SIZE → file of the studies that come with gqe_jax."""
    return {f"{path.parent.name}:{path.stem}": path for path in sorted(_FOLDER.glob("studies/*/*.toml"))}
