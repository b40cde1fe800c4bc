"""How the command reports an error: a paragraph, and the exit code."""

import signal
import sys
import traceback

from gqe_jax.config import ConfigError


def report(who: str, error: BaseException) -> int:
    """Prints what went wrong; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print(f"{who}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    if isinstance(error, (ConfigError, FloatingPointError, OSError)):
        print(f"{who}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    if isinstance(error, ImportError) and "gcsfs" in str(error):  # fsspec's words, at the first path of a bucket
        remedy = "pip install 'gqe_jax[gcs]'"
        print(f"{who}: paths of a bucket (gs://) need gcsfs, which is not installed: {remedy}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    return 1
