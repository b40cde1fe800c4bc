"""`gqe bench data`: how fast text becomes rows, rows become batches, and whether a training step has to wait."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gqe_jax.attention import GQAConfig
from gqe_jax.config import ConfigError, DataConfig, ModelConfig
from gqe_jax.data.preparing.prepare import prepare
from gqe_jax.data.reading.pipeline import TrainingStream, train_batches
from gqe_jax.data.reading.prepared import PreparedData, open_data
from gqe_jax.data.sources.corpus import Corpus, files_corpus, stdlib_corpus
from gqe_jax.data.tokenizer import SentencePieceTokenizer, load_tokenizer, train_sentencepiece

_SEQ_LEN, _BATCH_SIZE, _STEP_SECONDS = 2048, 16, 0.05
_FILES_PER_WORKER = 2
_MODEL = ModelConfig(
    context=_SEQ_LEN, vocab_size=2**20, attention=GQAConfig(num_query_heads=1, num_kv_heads=1)
)  # data of any tokenizer


def write_corpus(folder: Path, megabytes: float, files: int) -> Corpus:
    """Writes text of Python's standard library, repeated as needed, to `files` files of JSON lines of equal size."""
    texts = [json.dumps({"text": document.text}) + "\n" for document in stdlib_corpus().documents()]
    size, each, lines = megabytes * 1e6 / files, 0, _endless(texts)
    for number in range(files):
        with (folder / f"{number:03d}.jsonl").open("w") as file:
            each = 0
            while each < size:
                each += file.write(next(lines))
    return files_corpus([folder / "*.jsonl"])


def _endless(texts: list[str]) -> Iterator[str]:
    while True:
        yield from texts


def preparing(corpus: Corpus, folder: Path, tokenizer: str, workers: int) -> tuple[float, PreparedData]:
    """(MB/s of text through the whole preparation, what was prepared)."""
    began = time.perf_counter()
    manifest = prepare(corpus, folder, tokenizer=load_tokenizer(tokenizer), seq_len=_SEQ_LEN, workers=workers)
    seconds = time.perf_counter() - began
    megabytes = (manifest.train.bytes + manifest.heldout.bytes) / 1e6
    return megabytes / seconds, open_data(DataConfig(path=str(folder)), _MODEL)


def library_encoding(corpus: Corpus, tokenizer: str) -> float:
    """MB/s of text through the batch encoder of the tokenizer's own library, one thread, all documents in memory."""
    made = load_tokenizer(tokenizer)
    texts = [document.text for document in corpus.documents()]
    if isinstance(made, SentencePieceTokenizer):
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=made.files()["sentencepiece.model"])
        encode = functools.partial(processor.encode, num_threads=1)
    else:
        encode = made.encode_batch
    began = time.perf_counter()
    encode(texts)
    return sum(len(text.encode()) for text in texts) / 1e6 / (time.perf_counter() - began)


def reading(data: PreparedData, batches: int) -> float:
    """Tokens per second of one core that batches of shuffled packed rows are made of, 16 × 2048 at a time."""
    stream = TrainingStream(data, seed=0)
    stream.read(range(_BATCH_SIZE))
    began = time.process_time()
    for step in range(batches):
        stream.read(range(step * _BATCH_SIZE, (step + 1) * _BATCH_SIZE))
    return batches * _BATCH_SIZE * _SEQ_LEN / (time.process_time() - began)


def waiting(data: PreparedData, steps: int) -> float:
    """Share of the time that a loop waits for its next batch, beside a step of 50 ms that needs no core of the host."""
    waited = 0.0
    with train_batches(data, batch_size=_BATCH_SIZE, seed=0) as batches:
        next(batches)
        began = time.perf_counter()
        for _ in range(steps):
            time.sleep(_STEP_SECONDS)
            asked = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - asked
        return waited / (time.perf_counter() - began)


def run(*, megabytes: float, tokenizer: str | None, workers: int) -> None:
    """Prints the figures beside what they should be.

    Args:
      megabytes: of text to prepare.
      tokenizer: file, beside bytes; None: a SentencePiece model of 8000 pieces that is trained here.
      workers: processes that prepare.

    Raises:
      ConfigError: a number out of range, a tokenizer that cannot be read.
    """
    if megabytes <= 0 or workers < 1:
        raise ConfigError(f"--megabytes={megabytes:g} and --workers={workers} must be positive")
    print(f"{megabytes:g} MB of text, {workers} process(es), rows of {_SEQ_LEN} tokens")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "text").mkdir()
        corpus = write_corpus(folder / "text", megabytes, _FILES_PER_WORKER * workers)
        rate, data = preparing(corpus, folder / "bytes", "bytes", workers)
        print(f"prepare with bytes          {rate:8.1f} MB/s      (at least 20 on two cores)", flush=True)
        if tokenizer is None:
            tokenizer = str(folder / "sentencepiece.model")
            train_sentencepiece((d.text for d, _ in zip(corpus.documents(), range(200), strict=False)), 8000, tokenizer)
        part = dataclasses.replace(corpus, files=corpus.files[:1])
        rate, own = preparing(part, folder / "pieces", tokenizer, 1)[0], library_encoding(part, tokenizer)
        print(f"prepare with {Path(tokenizer).name}, one process: {rate:.1f} MB/s; its library alone: {own:.1f} MB/s")
        print(f"                            {rate / own:8.2f} of it    (at least 0.8)", flush=True)
        print(f"reading packed rows         {reading(data, 200) / 1e6:8.1f} M tokens/s of one core (at least 10)")
        share = waiting(data, 100)
        print(f"waiting for data            {share:8.3%} of the time, with steps of 50 ms of 16 rows (below 1%)")
