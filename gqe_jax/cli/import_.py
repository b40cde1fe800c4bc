"""`gqe import`."""

import argparse
import shlex
from pathlib import Path

from gqe_jax.cli.options import add_config
from gqe_jax.config import ConfigError

EPILOG = """examples:
  gqe import --from exported/smoke --run runs/back
  gqe import --from ../Qwen3-0.6B --run runs/qwen3 --dtype bfloat16
  gqe import --from exported/layers/attention.safetensors --pattern 'layers.{layer}.' --config smoke --run runs/mine

The folder is one that gqe export wrote, or a Llama, Mistral, Qwen2, Qwen3, SmolLM or Phi-3: config.json, safetensors
and the tokenizer. With --pattern, only the attention layers are read, from a checkpoint of your own that uses the
package gqe; the rest of the model that --config names starts from its initialisation. PyTorch is not needed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `gqe import`."""
    parser.epilog = EPILOG
    parser.add_argument("--from", required=True, metavar="DIR", dest="source", help="the folder to read")
    parser.add_argument("--run", required=True, metavar="DIR", help="run to make; must not exist, or be empty")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="'bytes', a SentencePiece .model or a tokenizer.json (default: the folder's; with --pattern the config's)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the parameters; bfloat16 halves the run, but does not train well (default: float32)",
    )
    parser.add_argument(
        "--pattern",
        metavar="PREFIX",
        help="read attention layers of the package gqe only: what stands before q_proj.weight, {layer} for the number",
    )
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="take weights that are NaN or infinite (default: refuse them)"
    )
    add_config(parser, purpose="with --pattern: the configuration of the whole model", required=False)


def run(args: argparse.Namespace) -> int:
    """Imports and says what came of it; returns the exit code 0. Raises as `import_folder`."""
    from gqe_jax import flops
    from gqe_jax.config_files import load_config
    from gqe_jax.pytorch.importing import import_folder, import_layers, left_behind
    from gqe_jax.runs.new_run import CONFIG_FILE, TOKENIZER

    if (args.pattern is None) != (args.config is None):
        given, other = ("--pattern", "--config") if args.config is None else ("--config", "--pattern")
        raise ConfigError(
            f"{given} needs {other}: --pattern says which attention layers to read, --config which model they are for; "
            f"leave both out to import a folder with a config.json"
        )
    options = {"tokenizer": args.tokenizer, "allow_nonfinite": args.allow_nonfinite}
    if args.pattern is None:
        config = import_folder(args.source, args.run, dtype=args.dtype, **options)
        train = str(Path(args.run) / CONFIG_FILE)
        for what in left_behind(Path(args.source)):
            print(f"left behind: {what}")
    else:
        config = load_config(args.config, args.overrides)
        import_layers(args.source, args.run, config, pattern=args.pattern, **options)
        print("only the attention layers were read: the rest of the model starts from its initialisation")
        train = " ".join([shlex.quote(args.config), *(shlex.quote(f"--config.{item}") for item in args.overrides)])
    attention = config.model.attention
    print(
        f"{flops.parameter_count(config.model)['total']:,} parameters, {config.model.num_layers} layers, attention "
        f"{attention.kind} ({attention.summary}), "
        f"written to {args.run}. Next:"
    )
    quoted = shlex.quote(args.run)
    (tokenizer, *_) = sorted((Path(args.run) / TOKENIZER).iterdir())
    spec = "bytes" if tokenizer.name == "bytes.json" else shlex.quote(str(tokenizer))
    print(f"  gqe generate --run {quoted} --prompt 'The '")
    length = min(512, config.model.context)
    print(f"  gqe prepare --data 'path/**/*.txt' --tokenizer {spec} --seq-len {length} --out data/mine")
    print(f"  gqe train --config {train} --run {quoted} --config.data.path=data/mine")
    return 0
