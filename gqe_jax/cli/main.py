"""The command `gqe`: reads arguments, calls one function, turns errors into a paragraph and an exit code.

Exit codes: 0 done; 1 the run failed (disk, numbers); 2 input that cannot be used; 128 + n stopped by signal n, saved.
"""

import argparse
import functools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from gqe_jax.config import ConfigError, nearest

# Verb → function that adds its arguments and returns what runs it. Each imports what it needs: `gqe --help` is quick.
Runner = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `gqe VERB ...`; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="gqe",
        description="Train, evaluate and use language models with Grouped Query Experts attention.",
        epilog="Start with: gqe train --config smoke --run runs/smoke",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, (summary, _) in VERBS.items():
        verbs.add_parser(verb, help=summary, add_help=False)
    if argv and argv[0] in VERBS:
        return _run_verb(argv[0], argv[1:])
    if argv and not argv[0].startswith("-"):
        parser.error(f"{argv[0]!r} is no verb: {nearest(argv[0], VERBS)}; gqe --help explains them")
    parser.parse_args(argv)  # help, or the error
    return 2


def command() -> None:
    """What the command `gqe` calls: `main`, and the end of the process."""
    code = main()
    if code == 128 + signal.SIGINT:  # XLA may still be compiling in a thread, which dies of Python's orderly end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run_verb(verb: str, argv: list[str]) -> int:
    summary, add = VERBS[verb]
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _report_unraisable
    parser = argparse.ArgumentParser(
        prog=f"gqe {verb}",
        description=summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    try:
        run = add(parser)
        overrides = [arg for arg in argv if re.match(r"--config\.", arg)]
        for override in overrides:  # before argparse meets the value of "--config.a.b value" and calls it unknown
            if "=" not in override:
                parser.error(f"{override} has no value: write {override}=VALUE, without a space")
        args = parser.parse_args([arg for arg in argv if arg not in overrides])
        if overrides and not hasattr(args, "config"):
            parser.error(f"{overrides[0]}: gqe {verb} takes no config overrides")
        args.overrides = [override.removeprefix("--config.") for override in overrides]
        return run(args)
    except BrokenPipeError:  # who read our output has gone: `gqe ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again as it ends
        return 128 + signal.SIGPIPE
    except (ConfigError, FloatingPointError, OSError, KeyboardInterrupt) as error:
        return _report(f"gqe {verb}", error)


def _report(who: str, error: BaseException) -> int:
    """Prints what went wrong; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print(f"{who}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    if isinstance(error, (ConfigError, FloatingPointError, OSError)):
        print(f"{who}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    traceback.print_exception(error)
    return 1


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    # After a failed write the storage library's threads still report to an event loop that is gone: a traceback each,
    # around the one message that says what happened.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _add_train(parser: argparse.ArgumentParser) -> Runner:
    parser.epilog = """example:
  gqe train --config smoke:steps=200 --run runs/short --config.train.log_every=10

--config.a.b=VALUE overrides any field of the configuration. A run that exists is continued from its newest
checkpoint. On several machines, start the same command on each, with --distributed or --coordinator."""
    _add_config(parser)
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
        "--start-timeout", type=float, default=300.0, metavar="SECONDS", help="for all to have started (default: 300)"
    )

    def run(args: argparse.Namespace) -> int:
        from gqe_jax.config_dict import to_dict
        from gqe_jax.config_files import load_config
        from gqe_jax.processes.joined import joined
        from gqe_jax.processes.place import place_from
        from gqe_jax.runs.directory import check_directory
        from gqe_jax.train.loop import Interrupted, train

        config = load_config(args.config, args.overrides)
        check_directory(args.run)
        place = place_from(args)
        who = "gqe train" if place is None else f"gqe train, process {place.process_id} of {place.num_processes}"
        with joined(
            place, to_dict(config), args.run, timeout=args.start_timeout, report=functools.partial(_report, who)
        ):
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

    return run


def _add_eval(parser: argparse.ArgumentParser) -> Runner:
    from gqe_jax.evaluate import tasks

    parser.epilog = """examples:
  gqe eval --run runs/smoke
  gqe eval --run runs/smoke --tasks hellaswag,arc_easy,piqa"""
    _add_run(parser)
    parser.add_argument("--data", metavar="DIR", help="prepared data (default: what the run was trained on)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="ROWS")
    _add_mesh(parser, "data=-1")
    tasks.add_arguments(parser)

    def run(args: argparse.Namespace) -> int:
        import dataclasses

        import jax

        from gqe_jax.data.reading.prepared import open_data
        from gqe_jax.evaluate.heldout import compare_with_compressors, evaluate_model, report
        from gqe_jax.parallel.mesh import make_mesh, parse_mesh
        from gqe_jax.runs.load import load_model

        tasks.check_arguments(args)
        mesh = make_mesh(parse_mesh(args.mesh))
        sharing = mesh.shape["data"] * mesh.shape["fsdp"]
        if args.batch_size < 1 or args.batch_size % sharing:
            raise ConfigError(
                f"--batch-size={args.batch_size} is no positive multiple of the {sharing} device(s) that share a "
                f"batch: set it to one"
            )
        if args.tasks is not None:
            return tasks.run(args)
        trained = load_model(args.run, args.step, mesh)
        config = trained.config
        if args.data is not None:
            named = dataclasses.replace(config.data, path=args.data, mixture=None)
            config = dataclasses.replace(config, data=named)
        data = open_data(config.data, config.model, trained.tokenizer)
        with jax.set_mesh(mesh):
            result = evaluate_model(trained.model, data, mesh, batch_size=args.batch_size)
        print(f"{args.run}, step {trained.step}: {report(result)}")
        print(compare_with_compressors(result, data))
        return 0

    return run


def _add_generate(parser: argparse.ArgumentParser) -> Runner:
    from gqe_jax import generate

    parser.epilog = """example:
  gqe generate --run runs/smoke --prompt 'def main(' --max-new-tokens 200"""
    _add_run(parser)
    _add_mesh(parser, "expert=1")
    generate.add_arguments(parser)

    def run(args: argparse.Namespace) -> int:
        import jax

        from gqe_jax.parallel.mesh import make_mesh, parse_mesh
        from gqe_jax.runs.load import load_model

        config = parse_mesh(args.mesh)
        if config.data * config.fsdp * config.context != 1:
            raise ConfigError(f"--mesh={args.mesh}: one prompt can be spread over `expert` only: leave out other axes")
        mesh = make_mesh(config, jax.local_devices()[: config.expert if config.expert > 0 else None])
        with jax.set_mesh(mesh):
            trained = load_model(args.run, args.step, mesh)
            return generate.run_generation(trained.model, trained.tokenizer, args)

    return run


def _add_prepare(parser: argparse.ArgumentParser) -> Runner:
    from gqe_jax.cli import prepare as prepare_cli

    prepare_cli.add_arguments(parser)
    return prepare_cli.run


def _add_export(parser: argparse.ArgumentParser) -> Runner:
    from gqe_jax.pytorch import exporting

    _add_run(parser)
    exporting.add_arguments(parser)
    return exporting.run


def _add_import(parser: argparse.ArgumentParser) -> Runner:
    from gqe_jax.pytorch import importing

    importing.add_arguments(parser)
    return importing.run


def _add_plan(parser: argparse.ArgumentParser) -> Runner:
    from gqe_jax.plan import verb

    parser.epilog = """examples:
  gqe plan --config gqe_250m --topology v5e:4x4
  gqe plan --config gqe_8b --topology v5p:4x4x4 --search
  gqe plan --config gqe_8b --topology v6e:16x16 --mode decode --config.mesh.fsdp=1 --config.mesh.expert=4"""
    verb.add_arguments(parser)
    return verb.run


def _add_bench(parser: argparse.ArgumentParser) -> Runner:
    from gqe_jax.bench import attention, data

    parser.epilog = """examples:
  gqe bench data
  gqe bench attention
  gqe bench attention --target v6e"""
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    attention.add_arguments(what.add_parser("attention", help="attention and whole layers beside their rivals"))
    data.add_arguments(what.add_parser("data", help="preparing text, reading rows, waiting for them"))
    return lambda args: {"attention": attention, "data": data}[args.what].run(args)


def _add_inspect(parser: argparse.ArgumentParser) -> Runner:
    from gqe_jax.evaluate import data_report, kernel_report, run_report

    parser.epilog = """examples:
  gqe inspect data data/mine
  gqe inspect run --run runs/smoke
  gqe inspect kernels --config gqe_250m:head_dim=128"""
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    run_report.add_arguments(what.add_parser("run", help="configuration, loss curve and expert load of a run"))
    data_report.add_arguments(what.add_parser("data", help="manifest, rows and lengths of prepared data"))
    kernel_report.add_arguments(what.add_parser("kernels", help="which attention kernel each platform takes, and why"))
    return lambda args: {"run": run_report, "data": data_report, "kernels": kernel_report}[args.what].run(args)


VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], Runner]]] = {
    "train": ("Train a model, or continue a run.", _add_train),
    "eval": ("Loss of a trained model on held-out text, beside compressors'; or its scores on tasks.", _add_eval),
    "generate": ("Continue a prompt with a trained model.", _add_generate),
    "prepare": ("Turn text into rows of tokens to train on.", _add_prepare),
    "export": ("Write a trained model for PyTorch, without PyTorch.", _add_export),
    "import": ("Make a run from a PyTorch model's folder, without PyTorch.", _add_import),
    "plan": ("See whether a configuration fits a slice of TPUs, and how fast it could be, without a TPU.", _add_plan),
    "inspect": ("Look at a run, at prepared data, or at the kernels that a configuration takes.", _add_inspect),
    "bench": ("Measure this machine.", _add_bench),
}


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARG]",
        help="configuration: a Python file with get_config(arg), or the name of one that comes with gqe_jax (smoke)",
    )


def _add_mesh(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--mesh",
        default=default,
        metavar="AXIS=N,...",
        help="how many devices along data, fsdp and expert; -1: what is left (default: %(default)s)",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="DIR", help="directory of the run")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to use (default: the newest)")


if __name__ == "__main__":
    command()
