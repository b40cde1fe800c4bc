"""Turns a Llama folder into a GQE run, trains it on, and exports it: `python convert_llama.py FOLDER TEXT OUT`.

FOLDER is what `save_pretrained` writes for Llama, Mistral, Qwen2 or Qwen3, with a tokenizer.json; TEXT is a pattern of
text files, in quotes. These are the README's five commands.
"""

import pathlib
import subprocess
import sys


def main(folder, text, out, *overrides):
    out = pathlib.Path(out)
    llama, data, gqe, exported = (str(out / name) for name in ("llama", "data", "gqe", "exported"))
    tokenizer = str(pathlib.Path(llama) / "tokenizer" / "tokenizer.json")
    for command in (
        ["import", "--from", folder, "--run", llama],
        ["prepare", "--data", text, "--tokenizer", tokenizer, "--seq-len", "64", "--out", data],
        ["convert", "--run", llama, "--data", data, "--to", "gqe", "--top-k", "1", "--out", gqe],
        ["train", "--config", f"{gqe}/config.py", "--run", gqe, *overrides],
        ["export", "--run", gqe, "--out", exported],
    ):
        print("gqe", *command, flush=True)
        subprocess.run(["gqe", *command], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
