"""Data: tokenizers, offline preparation of rows, and the batches that training and evaluation read."""

from gqe_jax.data.manifest import Manifest, heldout_documents, prepared_tokenizer, verify
from gqe_jax.data.preparing.prepare import default_corpus_dir
from gqe_jax.data.reading.compressors import compression_baselines
from gqe_jax.data.reading.pipeline import Batches, PreparedRows, heldout_batches, train_batches
from gqe_jax.data.reading.prepared import PreparedData, PreparedSet, open_data
from gqe_jax.data.sources.corpus import Corpus, files_corpus, stdlib_corpus
from gqe_jax.data.sources.files import Document
from gqe_jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_files, train_sentencepiece

__all__ = [  # noqa: RUF022 (grouped by subject)
    # Tokenizers
    "Tokenizer",
    "load_tokenizer",
    "tokenizer_from_files",
    "train_sentencepiece",
    # Documents
    "Corpus",
    "Document",
    "files_corpus",
    "stdlib_corpus",
    # Prepared data sets
    "Manifest",
    "PreparedData",
    "PreparedSet",
    "default_corpus_dir",
    "heldout_documents",
    "open_data",
    "prepared_tokenizer",
    "verify",
    # Batches
    "Batches",
    "PreparedRows",
    "heldout_batches",
    "train_batches",
    # The bar
    "compression_baselines",
]
