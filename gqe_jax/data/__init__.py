"""Data: tokenizers, offline preparation of rows, and the batches that training and evaluation read."""

from typing import TYPE_CHECKING

from gqe_jax.lazy import lazy_names

if TYPE_CHECKING:  # the same names as in `lazy_names` below
    from gqe_jax.data.manifest import Manifest, heldout_documents, prepared_tokenizer, verify
    from gqe_jax.data.preparing.prepare import default_corpus_dir
    from gqe_jax.data.reading.compressors import compression_baselines
    from gqe_jax.data.reading.pipeline import Batches, PreparedRows, heldout_batches, train_batches
    from gqe_jax.data.reading.prepared import PreparedData, PreparedSet, open_data
    from gqe_jax.data.sources.corpus import Corpus, files_corpus, stdlib_corpus
    from gqe_jax.data.sources.files import Document
    from gqe_jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_files, train_sentencepiece
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "gqe_jax.data.manifest": ("Manifest", "heldout_documents", "prepared_tokenizer", "verify"),
            "gqe_jax.data.preparing.prepare": ("default_corpus_dir",),
            "gqe_jax.data.reading.compressors": ("compression_baselines",),
            "gqe_jax.data.reading.pipeline": ("Batches", "PreparedRows", "heldout_batches", "train_batches"),
            "gqe_jax.data.reading.prepared": ("PreparedData", "PreparedSet", "open_data"),
            "gqe_jax.data.sources.corpus": ("Corpus", "files_corpus", "stdlib_corpus"),
            "gqe_jax.data.sources.files": ("Document",),
            "gqe_jax.data.tokenizer": ("Tokenizer", "load_tokenizer", "tokenizer_from_files", "train_sentencepiece"),
        },
    )

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
