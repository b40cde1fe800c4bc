"""Tokenizers: text to int32 ids and back, behind one small interface.

`load_tokenizer("bytes")`, a SentencePiece `.model` or a Hugging Face `tokenizer.json`. A tokenizer can be taken apart
into files and put together again, so that a checkpoint and a prepared data set carry the one they were made with.
"""

from __future__ import annotations

import abc
import codecs
import functools
import hashlib
import importlib
import io
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from gqe_jax.checked_json import LARGEST
from gqe_jax.config import ConfigError

REPLACEMENT = "\ufffd"

_BYTES_FILE = "bytes.json"
_SENTENCEPIECE_FILE = "sentencepiece.model"
_HUGGINGFACE_FILE = "tokenizer.json"
_HUGGINGFACE_CONFIG_FILE = "tokenizer_config.json"

# tokenizer.json does not say which token ends a document; these are the names in common use.
_EOS_NAMES = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "[EOS]")
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>")


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
      name: "bytes", "sentencepiece" or "huggingface".
      vocab_size: every id is below it.
      eos_id: stands before every document and after the last one.
      pad_id: fills the end of a row; may equal eos_id.
      stop_ids: end a generation; eos_id, and what ends a turn of a model that was tuned for chat.
    """

    name: str
    vocab_size: int
    eos_id: int
    pad_id: int

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.eos_id,)

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """int32 [n], with no special token added; special tokens' names within the text stay text."""

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """`encode` of each text, with so many threads where the library has them."""
        return [self.encode(text) for text in texts]

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids: special tokens and ids of no token are left out, invalid UTF-8 becomes
        U+FFFD."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """File name to content: all that `tokenizer_from_files` needs."""

    @functools.cached_property
    def digest(self) -> str:
        """sha256 (hex) of the files: two tokenizers with the same digest give the same ids."""
        digest = hashlib.sha256()
        for name, content in sorted(self.files().items()):
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()

    def __reduce__(self):  # for worker processes
        return tokenizer_from_files, (self.files(),)

    def stream(self) -> TokenStream | ByteStream:
        """Returns a decoder for ids that arrive one at a time: the pieces it returns concatenate to `decode` of all
        ids."""
        return TokenStream(self)


class TokenStream:
    """Incremental decoding for tokenizers whose ids are not single bytes.

    A token's text depends on its neighbours (a leading space, a character spread over several tokens), so a short
    window of ids is decoded each time, and text is given out once no later id can change it.
    """

    def __init__(self, tokenizer: Tokenizer, unsettled: Collection[int] = frozenset()):
        """unsettled: ids whose text later ids may still change, whatever it looks like now."""
        self._tokenizer = tokenizer
        self._unsettled = unsettled
        self._reset()

    def _reset(self) -> None:
        self._window: list[int] = []  # ids decoded together: some already given out, then the ones held back
        self._given_ids = 0  # how many of the window's ids have been given out
        self._given_text = ""  # the text of these

    def push(self, token_id: int) -> str:
        """Returns the text that has become certain with this id; often empty in the middle of a character."""
        self._window.append(int(token_id))
        if token_id in self._unsettled:
            return ""
        text = self._tokenizer.decode(self._window)
        if text.endswith(REPLACEMENT):  # perhaps the first bytes of a character
            return ""
        fresh = text[len(self._given_text) :]
        # Ids before the last ones given out are needed no longer, if those have text: a decoder treats only the very
        # beginning of a text specially (it drops a leading space), and that is then behind.
        last = self._window[self._given_ids :]
        last_text = self._tokenizer.decode(last)
        self._window, self._given_text = (last, last_text) if last_text else (self._window, text)
        self._given_ids = len(self._window)
        return fresh

    def flush(self) -> str:
        """Returns the text still held back; the stream starts anew."""
        rest = self._tokenizer.decode(self._window)[len(self._given_text) :]
        self._reset()
        return rest


class ByteStream:
    """Incremental decoding for `ByteTokenizer`."""

    def __init__(self, tokenizer: ByteTokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Returns the text that has become certain with this id; empty in the middle of a character."""
        return self._decoder.decode(self._tokenizer.to_bytes([token_id]))

    def flush(self) -> str:
        """Returns the text still held back; the stream starts anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes with ByT5's ids (Xue et al. 2022, arXiv 2105.13626): pad 0, eos 1, unk 2, byte b is b + 3."""

    name = "bytes"
    offset = 3
    vocab_size = 256 + offset
    eos_id = 1
    pad_id = 0

    def encode(self, text: str) -> np.ndarray:
        data = text.encode("utf-8", errors="replace")
        return np.add(np.frombuffer(data, np.uint8), self.offset, dtype=np.int32)

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of the ids; ids that stand for no byte are left out."""
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        ids = ids[(ids >= self.offset) & (ids < self.vocab_size)]
        return (ids - self.offset).astype(np.uint8).tobytes()

    def decode(self, ids: Iterable[int]) -> str:
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    def files(self) -> dict[str, bytes]:
        content = {"eos_id": self.eos_id, "offset": self.offset, "pad_id": self.pad_id, "vocab_size": self.vocab_size}
        return {_BYTES_FILE: (json.dumps(content, sort_keys=True) + "\n").encode()}

    def stream(self) -> ByteStream:
        return ByteStream(self)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (unigram or BPE), from its serialized form."""

    name = "sentencepiece"

    def __init__(self, model: bytes, origin: str = _SENTENCEPIECE_FILE):
        """Raises ConfigError if `model` is no SentencePiece model or has no end-of-sequence piece."""
        sentencepiece = _require_module("sentencepiece", origin)
        try:
            if not model:  # which the library takes for "no model yet"
                raise RuntimeError("empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, UnicodeDecodeError) as error:  # the latter for pieces that are no text
            empty = "" if model else ", for it is empty"
            raise ConfigError(
                f"tokenizer {origin} cannot be read as a SentencePiece model{empty}: give the .model file that "
                "sentencepiece's trainer wrote, a tokenizer.json, or 'bytes'"
            ) from error
        self._model = model
        self.vocab_size = self._processor.get_piece_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise ConfigError(
                f"tokenizer {origin} has no end-of-sequence piece (eos_id=-1), and every document is set off by one: "
                "train it with eos_id=1, or let `gqe prepare --train-sentencepiece VOCAB_SIZE` train one"
            )
        pad_id = self._processor.pad_id()
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        ids = self._processor.encode(list(texts), num_threads=threads, return_type="numpy")
        return [np.asarray(row, np.int32) for row in ids]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def files(self) -> dict[str, bytes]:
        return {_SENTENCEPIECE_FILE: self._model}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of Hugging Face's tokenizers library."""

    name = "huggingface"

    def __init__(self, definition: bytes, config: bytes | None = None, origin: str = _HUGGINGFACE_FILE):
        """definition: tokenizer.json. config: tokenizer_config.json, of which eos_token, pad_token and chat_template
        are read, and `stop_ids`, a list of ids that end a generation as eos_token does.

        Raises ConfigError if the definition cannot be read, or no token is known to end a document.
        """
        tokenizers = _require_module("tokenizers", origin)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition.decode("utf-8"))
            names = json.loads(config) if config else {}
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(
                f"tokenizer {origin} cannot be read as a Hugging Face tokenizer.json ({error}): give the file that "
                "the library's save() wrote, a SentencePiece .model, or 'bytes'"
            ) from error
        if not isinstance(names, dict):
            raise ConfigError(f"{_HUGGINGFACE_CONFIG_FILE} beside {origin} holds no JSON object: copy it again")
        self._definition = definition
        self._tokenizer.encode_special_tokens = True  # a document cannot forge an end of document
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if not 0 < self.vocab_size <= LARGEST:
            raise ConfigError(
                f"tokenizer {origin} has ids up to {self.vocab_size - 1}, which must lie in [0, {LARGEST}): copy it "
                "again"
            )
        eos = _token_name(names.get("eos_token"), _EOS_NAMES, vocabulary)
        if eos is None:
            raise ConfigError(
                f"tokenizer {origin} names no end-of-document token (eos_token={names.get('eos_token')!r} in "
                f"{_HUGGINGFACE_CONFIG_FILE} beside it, and none of {', '.join(_EOS_NAMES)} is in its vocabulary): put "
                f'a {_HUGGINGFACE_CONFIG_FILE} with {{"eos_token": "..."}} beside it'
            )
        pad = _token_name(names.get("pad_token"), _PAD_NAMES, vocabulary) or eos
        self.eos_id, self.pad_id = vocabulary[eos], vocabulary[pad]
        stops = names.get("stop_ids") or []
        if not isinstance(stops, list) or any(type(i) is not int or not 0 <= i < self.vocab_size for i in stops):
            raise ConfigError(
                f"tokenizer {origin} has ids up to {self.vocab_size - 1}, but {stops!r} should end a generation: "
                "correct eos_token_id in generation_config.json or config.json"
            )
        self._stop_ids = tuple(dict.fromkeys([self.eos_id, *stops]))
        kept = {"eos_token": eos, "pad_token": pad}
        if len(self._stop_ids) > 1:
            kept["stop_ids"] = list(self._stop_ids)
        if names.get("chat_template"):
            kept["chat_template"] = names["chat_template"]
        self._config = (json.dumps(kept, sort_keys=True) + "\n").encode()
        self._unsettled = frozenset()
        if '"ByteFallback"' in json.dumps(json.loads(definition).get("decoder")):
            # That decoder turns a whole run of byte tokens into U+FFFD if any of it is invalid; special tokens do not
            # interrupt a run.
            special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
            names = (f"<0x{byte:02X}>" for byte in range(256))
            self._unsettled = frozenset(special.union(vocabulary[name] for name in names if name in vocabulary))

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        # The library takes its number of threads from the environment (RAYON_NUM_THREADS).
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stop_ids

    def files(self) -> dict[str, bytes]:
        return {_HUGGINGFACE_FILE: self._definition, _HUGGINGFACE_CONFIG_FILE: self._config}

    def stream(self) -> TokenStream:
        return TokenStream(self, self._unsettled)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Returns the tokenizer named by `spec`: "bytes", a SentencePiece `.model` or a Hugging Face `tokenizer.json`.

    A `tokenizer_config.json` beside the latter says which token ends a document and which pads. Raises ConfigError if
    the file is missing, of no known kind, or needs a package that is not installed.
    """
    if str(spec) == ByteTokenizer.name:
        return ByteTokenizer()
    path = Path(spec)
    if not path.is_file():
        raise ConfigError(
            f"tokenizer={str(spec)!r} is neither 'bytes' nor an existing file: give 'bytes', a SentencePiece .model or "
            "a Hugging Face tokenizer.json"
        )
    if path.suffix == ".model":
        return SentencePieceTokenizer(path.read_bytes(), str(path))
    if path.suffix == ".json":
        config = path.with_name(_HUGGINGFACE_CONFIG_FILE)
        return HuggingFaceTokenizer(path.read_bytes(), config.read_bytes() if config.is_file() else None, str(path))
    raise ConfigError(
        f"tokenizer={str(spec)!r} has the suffix {path.suffix!r}, which says nothing about its kind: give 'bytes', a "
        "SentencePiece file ending in .model or a Hugging Face file ending in .json"
    )


def tokenizer_from_files(files: Mapping[str, bytes]) -> Tokenizer:
    """Returns the tokenizer whose `files()` these are. Raises ConfigError if they are no tokenizer's files."""
    if _BYTES_FILE in files:
        tokenizer = ByteTokenizer()
        if files[_BYTES_FILE] != tokenizer.files()[_BYTES_FILE]:
            raise ConfigError(
                f"{_BYTES_FILE} describes another byte tokenizer than this version's "
                f"({tokenizer.files()[_BYTES_FILE]}): use the gqe_jax version that wrote it, or prepare the data again"
            )
        return tokenizer
    if _SENTENCEPIECE_FILE in files:
        return SentencePieceTokenizer(files[_SENTENCEPIECE_FILE])
    if _HUGGINGFACE_FILE in files:
        return HuggingFaceTokenizer(files[_HUGGINGFACE_FILE], files.get(_HUGGINGFACE_CONFIG_FILE))
    raise ConfigError(
        f"no tokenizer among the files {sorted(files)}: one of {_BYTES_FILE}, {_SENTENCEPIECE_FILE} and "
        f"{_HUGGINGFACE_FILE} is expected; restore the folder or prepare the data again"
    )


def train_sentencepiece(documents: Iterable[str], vocab_size: int, out_path: str | Path) -> SentencePieceTokenizer:
    """Trains a unigram SentencePiece model on the documents and writes it to `out_path`.

    Ids: pad 0, eos 1, unk 2, newline 3, then the 256 bytes. No text normalisation, no dropped white space and bytes
    for unseen characters, so decoding gives the text back (except U+2581, the library's own sign for a space). The
    same documents give the same bytes: the number of threads is fixed, and of more than two million lines a seeded
    sample is taken.

    Raises ConfigError if the vocabulary is too small for the bytes and frequent characters, or too large for the text.
    """
    sentencepiece = _require_module("sentencepiece", str(out_path))
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(documents),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            user_defined_symbols=["\n"],
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            input_sentence_size=2_000_000,
            shuffle_input_sentence=True,
            num_threads=4,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1] or str(error)
        raise ConfigError(
            f"train_sentencepiece: vocab_size={vocab_size} does not fit this text ({reason}): choose another size "
            "(300 is about the least; small texts allow only small vocabularies), or use the bytes tokenizer"
        ) from error
    Path(out_path).write_bytes(model.getvalue())
    return SentencePieceTokenizer(model.getvalue(), str(out_path))


def _training_lines(documents: Iterable[str], longest: int = 1000) -> Iterable[str]:
    """Lines without their newline, cut where longer than the trainer takes (4192 bytes; a character has up to 4)."""
    for document in documents:
        for line in document.split("\n"):
            for begin in range(0, len(line), longest):
                yield line[begin : begin + longest]


def _token_name(named: str | Mapping | None, usual: Sequence[str], vocabulary: Mapping[str, int]) -> str | None:
    """Returns the token a tokenizer_config.json names (a string, or an object with "content"), else a usual name."""
    if isinstance(named, Mapping):
        named = named.get("content")
    return next((name for name in (named, *usual) if isinstance(name, str) and name in vocabulary), None)


def _require_module(name: str, origin: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"tokenizer {origin} needs the package {name}, which is not installed: pip install 'gqe_jax[tokenizers]', "
            "or use the bytes tokenizer"
        ) from error
