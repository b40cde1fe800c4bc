"""`gqe export`."""

import argparse
from pathlib import Path

from gqe_jax.cli.options import add_run

EPILOG = """examples:
  gqe export --run runs/smoke --out exported/smoke
  gqe export --run runs/smoke --out exported/smoke_bf16 --dtype bfloat16
  gqe export --run runs/smoke --out exported/layers --format gqe

The first two are read with transformers' AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True); the third
holds layers.0.q_proj.weight and so on, for the attention module of the package gqe. PyTorch is not needed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `gqe export`."""
    parser.epilog = EPILOG
    add_run(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make; must not exist, or be empty")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights (default: the checkpoint's; routers: float32)"
    )
    parser.add_argument(
        "--format",
        choices=("hf", "gqe"),
        default="hf",
        help="hf: a model for transformers; gqe: the attention layers in the package gqe's names (default: hf)",
    )


def run(args: argparse.Namespace) -> int:
    """Exports and says what was written; returns the exit code 0. Raises as `export_hf` and `open_model`."""
    from gqe_jax.pytorch.exporting import LAYERS_FILE, export_hf, export_layers
    from gqe_jax.pytorch.hf_config import CODE_FILES
    from gqe_jax.runs.saved_model import open_model

    saved = open_model(args.run, args.step)
    if args.format == "hf":
        print(export_hf(saved, args.out, dtype=args.dtype))
        trust = ", trust_remote_code=True" if (Path(args.out) / CODE_FILES[0]).exists() else ""
        how = f"AutoModelForCausalLM.from_pretrained({args.out!r}{trust})"
    else:
        export_layers(saved, args.out, dtype=args.dtype)
        how = f"safetensors.torch.load_file({str(Path(args.out) / LAYERS_FILE)!r})"
    size = sum(path.stat().st_size for path in Path(args.out).iterdir())
    print(f"step {saved.step} of {args.run} written to {args.out} ({size / 1e6:,.1f} MB); read it with {how}")
    return 0
