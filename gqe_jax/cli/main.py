"""The command `gqe`: reads arguments, calls one function, turns errors into a paragraph and an exit code.

Exit codes: 0 done; 1 the run failed (disk, numbers); 2 input that cannot be used; 75 stuck, and ended by its watchdog;
128 + n stopped by signal n, saved unless the signal was repeated.
"""

import argparse
import importlib
import os
import re
import signal
import sys
from collections.abc import Sequence

import gqe_jax
from gqe_jax.cli.errors import report
from gqe_jax.config import ConfigError, nearest

# Verb → (what it does, its module). A module has `add_arguments(parser)` and `run(args)`, which returns the exit code;
# it imports JAX in `run` only, so that help is quick.
VERBS = {
    "train": ("Train a model, or continue a run.", "train"),
    "eval": ("Loss of a trained model on held-out text, beside compressors'; or its scores on tasks.", "eval"),
    "generate": ("Continue a prompt with a trained model.", "generate"),
    "prepare": ("Turn text into rows of tokens to train on.", "prepare"),
    "export": ("Write a trained model for PyTorch, without PyTorch.", "export"),
    "import": ("Make a run from a PyTorch model's folder, without PyTorch.", "import_"),
    "convert": ("Make a run with another kind of attention of a dense model's run.", "convert"),
    "plan": ("See whether a configuration fits a slice of TPUs, and how fast it could be, without a TPU.", "plan"),
    "inspect": ("Look at a run, at prepared data, or at the kernels that a configuration takes.", "inspect"),
    "study": ("Train arms from several seeds, and tell which differences are resolved.", "study"),
    "heads": ("Choose how many heads a model should have for a context length.", "heads"),
    "bench": ("Measure this machine.", "bench"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `gqe VERB ...`; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="gqe",
        description="Train, evaluate and use language models with Grouped Query Experts attention.",
        epilog="Start with: gqe train --config smoke --run runs/smoke",
    )
    parser.add_argument("--version", action="version", version=f"gqe_jax {gqe_jax.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for verb, (summary, _) in VERBS.items():
        verbs.add_parser(verb, help=summary, add_help=False)
    if argv and argv[0] in VERBS:
        return _run_verb(argv[0], argv[1:])
    if argv and not argv[0].startswith("-"):
        parser.error(f"{argv[0]!r} is no verb: {nearest(argv[0], VERBS)}; gqe --help explains them")
    parser.parse_args(argv)  # --help, --version, or an error
    parser.print_help()
    return 0


def command() -> None:
    """What the command `gqe` calls: `main`, and the end of the process."""
    code = main()
    if code == 128 + signal.SIGINT:  # XLA may still be compiling in a thread, which dies of Python's orderly end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run_verb(verb: str, argv: list[str]) -> int:
    summary, module_name = VERBS[verb]
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _report_unraisable
    parser = argparse.ArgumentParser(
        prog=f"gqe {verb}",
        description=summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    try:
        module = importlib.import_module(f"gqe_jax.cli.{module_name}")
        module.add_arguments(parser)
        overrides = [arg for arg in argv if re.match(r"--config\.", arg)]
        for override in overrides:  # before argparse meets the value of "--config.a.b value" and calls it unknown
            if "=" not in override:
                parser.error(f"{override} has no value: write {override}=VALUE, without a space")
        args = parser.parse_args([arg for arg in argv if arg not in overrides])
        if overrides and not hasattr(args, "config"):
            parser.error(f"{overrides[0]}: gqe {verb} takes no config overrides")
        args.overrides = [override.removeprefix("--config.") for override in overrides]
        return module.run(args)
    except BrokenPipeError:  # who read our output has gone: `gqe ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again as it ends
        return 128 + signal.SIGPIPE
    except (ConfigError, FloatingPointError, OSError, KeyboardInterrupt) as error:
        return report(f"gqe {verb}", error)


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    # After a failed write the storage library's threads still report to an event loop that is gone: a traceback each,
    # around the one message that says what happened.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    command()
