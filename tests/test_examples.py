"""Runs what `examples/` has, as a reader would: each as a program, on small inputs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import QUICK_FLAGS

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
}


def run(*words: object, cwd: Path = EXAMPLES, flags: str = QUICK_FLAGS) -> str:
    environment = ENVIRONMENT | {"XLA_FLAGS": flags}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def module(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_attend_alone():
    """The last row of a prefill is what one token computes against the cache: they round differently, no more."""
    assert module("attend_alone").main() < 1e-5


@pytest.mark.slow
def test_the_linen_model_learns():
    losses = module("linen_model").main()
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_nnx_model_learns():
    """Its text repeats, so 30 steps bring it well below 3.3 nats, those of a coin with a side for each character."""
    assert module("nnx_model").main() < 3.0


@pytest.mark.slow
def test_a_llama_becomes_gqe(tmp_path):
    """A folder as transformers writes it goes through the five commands; transformers loads what comes out."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")

    folder, text = tmp_path / "llama", tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Document {n} of many says {n * n} and a little more." * 4 for n in range(80)))
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.ByteLevel(), tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train([str(text)], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).save_pretrained(folder)

    few = ["--config.train.steps=2", "--config.data.batch_size=4", "--config.optimizer.warmup_steps=0"]
    few += ["--config.optimizer.decay_steps=0", "--config.mesh.data=1"]
    out = run(sys.executable, EXAMPLES / "convert_llama.py", folder, text, tmp_path / "out", *few)
    assert out.count("gqe ") >= 5
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "exported", trust_remote_code=True)
    assert model.config.model_type == "gqe"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """Every cell in its order, in one process, but for the installation; `!` lines go to a shell, as in a notebook."""
    notebook = json.loads((EXAMPLES / "first_hour.ipynb").read_text())
    program = ["import subprocess"]
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "pip install" in source:
            continue
        assert not cell["outputs"], "clear the outputs before committing"
        for line in source.splitlines():
            command = line.removeprefix("!")
            program.append(line if command == line else f"subprocess.run({command!r}, shell=True, check=True)")
    run(sys.executable, "-c", "\n".join(program), cwd=tmp_path, flags="")  # its training is longer than its compilation
