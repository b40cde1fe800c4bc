"""`gqe eval`."""

import argparse
from pathlib import Path

from gqe_jax.cli.options import add_mesh, add_run
from gqe_jax.config import ConfigError

EPILOG = """examples:
  gqe eval --run runs/smoke
  gqe eval --run runs/smoke --tasks hellaswag,arc_easy,piqa"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `gqe eval`."""
    parser.epilog = EPILOG
    add_run(parser)
    parser.add_argument("--data", metavar="DIR", help="prepared data (default: what the run was trained on)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="ROWS")
    add_mesh(parser, "data=-1")
    group = parser.add_argument_group("tasks of lm-eval (extra `eval`)")
    group.add_argument("--tasks", metavar="NAME,...", help="tasks, groups or tags of lm-eval to score the model on")
    group.add_argument("--data-dir", metavar="DIR", help="local data, as piqa_validation.jsonl; no Hub then")
    group.add_argument("--limit", type=int, metavar="N", help="the first N items of each task (default: all)")
    group.add_argument("--num-fewshot", type=int, metavar="N", help="solved examples before each item")
    group.add_argument("--out", metavar="FILE", help="lm-eval's JSON (default: RUN/lm_eval/results_TIME.json)")


def run(args: argparse.Namespace) -> int:
    """Evaluates, and prints the result; returns the exit code."""
    import dataclasses

    import jax

    from gqe_jax.data.reading.prepared import open_data
    from gqe_jax.evaluate import tasks
    from gqe_jax.evaluate.heldout import compare_with_compressors, evaluate_model, report
    from gqe_jax.parallel.mesh import make_mesh, parse_mesh
    from gqe_jax.runs.load import load_model

    _check_options_of_tasks(args)
    if args.tasks is not None:
        tasks.check(args.data_dir, args.limit, args.num_fewshot)
    mesh = make_mesh(parse_mesh(args.mesh))
    sharing = mesh.shape["data"] * mesh.shape["fsdp"]
    if args.batch_size < 1 or args.batch_size % sharing:
        raise ConfigError(
            f"--batch-size={args.batch_size} is no positive multiple of the {sharing} device(s) that share a "
            f"batch: set it to one"
        )
    if args.tasks is not None:
        names = [name.strip() for name in args.tasks.split(",") if name.strip()]
        if not names:
            raise ConfigError(
                f"--tasks={args.tasks!r} names no task: give some of lm-eval's, as in --tasks piqa,arc_easy"
            )
        tasks.score_run(
            args.run,
            names,
            step=args.step,
            batch_size=args.batch_size,
            data_dir=args.data_dir,
            limit=args.limit,
            num_fewshot=args.num_fewshot,
            out=args.out,
        )
        return 0
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


def _check_options_of_tasks(args: argparse.Namespace) -> None:
    """Raises ConfigError for options of `--tasks` without it, and for those that do not go with it."""
    options = {"--data-dir": args.data_dir, "--limit": args.limit, "--num-fewshot": args.num_fewshot, "--out": args.out}
    given = [option for option, value in options.items() if value is not None]
    if args.tasks is None and given:
        say = "says" if len(given) == 1 else "say"
        raise ConfigError(f"{', '.join(given)} only {say} how to score tasks: add --tasks, for instance --tasks piqa")
    if args.tasks is not None and args.data is not None:
        raise ConfigError("--data is text to measure the loss on, and not for --tasks: leave out one of them")
    if args.out is not None and Path(args.out).is_dir():
        raise ConfigError(f"--out={args.out!r} is a folder: name the file to write")
