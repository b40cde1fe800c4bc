"""`gqe generate`."""

import argparse
from pathlib import Path

from gqe_jax.cli.options import add_mesh, add_run
from gqe_jax.config import ConfigError

EPILOG = """example:
  gqe generate --run runs/smoke --prompt 'def main(' --max-new-tokens 200"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `gqe generate`."""
    parser.epilog = EPILOG
    add_run(parser)
    add_mesh(parser, "expert=1")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; repeat it for several (default: empty)"
    )
    source.add_argument("--prompt-file", metavar="FILE", help="file whose text is continued")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: greedy; default: 0.8")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K most likely tokens; default: all")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="draw from the nucleus; default: 0.95")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: 0")


def run(args: argparse.Namespace) -> int:
    """Continues the prompts on standard output; returns the exit code."""
    import jax

    from gqe_jax.generate import Sampling, print_continuations
    from gqe_jax.parallel.mesh import make_mesh, parse_mesh
    from gqe_jax.runs.load import load_model

    config = parse_mesh(args.mesh)
    if config.data * config.fsdp * config.context != 1:
        raise ConfigError(f"--mesh={args.mesh}: one prompt can be spread over `expert` only: leave out other axes")
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    texts = [_read_prompt(args.prompt_file)] if args.prompt_file is not None else args.prompt or [""]
    mesh = make_mesh(config, jax.local_devices()[: config.expert if config.expert > 0 else None])
    with jax.set_mesh(mesh):
        trained = load_model(args.run, args.step, mesh)
        print_continuations(
            trained.model, trained.tokenizer, texts, max_new_tokens=args.max_new_tokens, sampling=sampling
        )
    return 0


def _read_prompt(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(
            f"--prompt-file {path!r} cannot be read ({error.strerror}): give the path of a text file"
        ) from error
