"""A tokenizer as the files that Hugging Face's AutoTokenizer reads, and back.

All three kinds become a `tokenizer.json`, which needs neither code of ours nor the sentencepiece package. There
`tokenizer(text)` puts an eos in front, as training does with every document, and a name like `</s>` within the text
stays text. A tokenizer.json that came from elsewhere keeps a bos of its own, and such names are special tokens in it.
The original, where it is another file, lies beside, so that an import restores the very tokenizer.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqe_jax.checked_json import check_fields, parse_json, read_object
from gqe_jax.config import ConfigError
from gqe_jax.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_files,
)
from gqe_jax.pytorch.outside import GENERATION_RULES, TOKENIZER_RULES

if TYPE_CHECKING:
    import tokenizers

DEFINITION = "tokenizer.json"
CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"  # where newer folders keep it, rather than in tokenizer_config.json
ORIGINAL = "original_tokenizer.json"  # beside a tokenizer.json that was changed
OWN_FILES = ("bytes.json", "sentencepiece.model")  # as `Tokenizer.files` names them
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
SPACE = "▁"  # SentencePiece's sign for a space
NAMES_ARE_TEXT = {"split_special_tokens": True}  # within a document, which so cannot forge the end of one


def tokenizer_files(tokenizer: Tokenizer, context: int) -> dict[str, bytes]:
    """File name → content of an exported folder.

    Args:
      context: longest sequence of the model, in tokens.
    """
    files = tokenizer.files()
    config: dict[str, Any] = {}
    if isinstance(tokenizer, ByteTokenizer):
        definition, config = _bytes_definition(tokenizer)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        definition, config = _sentencepiece_definition(files["sentencepiece.model"], tokenizer)
    else:
        definition, config = None, json.loads(files[CONFIG])
        config.pop("stop_ids", None)  # generation_config.json has them
        library, start = _library_tokenizer(tokenizer), start_token(tokenizer)
        config["bos_token"] = library.id_to_token(start)
        if library.encode("a").ids != [start, *tokenizer.encode("a")]:
            definition = json.loads(files[DEFINITION]) | {"post_processor": _beginning(config["bos_token"], start)}
            files[ORIGINAL] = files[DEFINITION]
    if definition is not None:
        files[DEFINITION] = _json(definition)
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    return files | {CONFIG: _json(config)}


def start_token(tokenizer: Tokenizer) -> int:
    """Returns the token that an exported tokenizer puts before a text: eos, or what a tokenizer.json has for it (a
    bos)."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        first = _library_tokenizer(tokenizer).encode("a").ids[0]
        if first != tokenizer.encode("a")[0]:
            return first
    return tokenizer.eos_id


def _library_tokenizer(tokenizer: HuggingFaceTokenizer) -> tokenizers.Tokenizer:
    import tokenizers  # an extra

    return tokenizers.Tokenizer.from_str(tokenizer.files()[DEFINITION].decode())


def read_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer of a folder.

    Raises:
      ConfigError: none that can be read.
    """
    own = {name: (folder / name).read_bytes() for name in OWN_FILES if (folder / name).is_file()}
    if own:
        return tokenizer_from_files(own)
    for name in (ORIGINAL, DEFINITION):
        if (folder / name).is_file():
            definition = (folder / name).read_bytes()
            return HuggingFaceTokenizer(definition, _json(_settings(folder, definition)), str(folder / name))
    for name in SENTENCEPIECE_FILES:
        if (folder / name).is_file():
            return load_tokenizer(folder / name)
    config = folder / CONFIG
    if config.is_file() and "ByT5Tokenizer" in config.read_text("utf-8"):
        return ByteTokenizer()
    raise ConfigError(
        f"{folder} has no tokenizer that can be read ({DEFINITION} or {' or '.join(SENTENCEPIECE_FILES)}): give one "
        f"with --tokenizer FILE, or --tokenizer bytes"
    )


def _settings(folder: Path, definition: bytes) -> dict[str, Any]:
    """tokenizer_config.json, with what its folder says elsewhere about the ends of a turn and the form of a chat.

    transformers ends a generation at each eos_token_id of generation_config.json, or else of config.json.
    """
    settings: dict[str, Any] = {}
    if (folder / CONFIG).is_file():
        settings = read_object(folder / CONFIG)
        check_fields(settings, TOKENIZER_RULES, str(folder / CONFIG))
    stops: Any = None
    for name in (GENERATION, "config.json"):
        if stops is None and (folder / name).is_file():
            content = read_object(folder / name)
            check_fields(content, GENERATION_RULES, str(folder / name))
            stops = content.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if stops:
        settings["stop_ids"] = stops
    if stops and not settings.get("eos_token"):
        added = parse_json(definition, folder / DEFINITION)
        added = added.get("added_tokens") if isinstance(added, dict) else None
        for token in added if isinstance(added, list) else []:
            if isinstance(token, dict) and token.get("id") == stops[0]:
                settings["eos_token"] = token.get("content")
    if (folder / CHAT_TEMPLATE).is_file():
        settings["chat_template"] = (folder / CHAT_TEMPLATE).read_text("utf-8", errors="replace")
    return settings


# ---------------------------------------------------------------------------- bytes


def _bytes_definition(tokenizer: ByteTokenizer) -> tuple[dict[str, Any], dict[str, Any]]:
    specials = {"<pad>": tokenizer.pad_id, "</s>": tokenizer.eos_id, "<unk>": 2}
    vocab = specials | {letter: byte + tokenizer.offset for byte, letter in enumerate(_byte_letters())}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [],
    }
    definition = _definition(specials, "</s>", model, None, byte_level, byte_level)
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return definition, names | NAMES_ARE_TEXT


def _byte_letters() -> list[str]:
    """Returns the printable letters that stand for the 256 bytes in byte-level tokenizers, as GPT-2 chose them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


# ---------------------------------------------------------------------------- SentencePiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of pieces
UNIGRAM, BPE = 1, 2  # types of models
UNKNOWN_PENALTY = 10.0  # SentencePiece's: an unknown character scores this much less than the worst piece


def _sentencepiece_definition(model: bytes, tokenizer: SentencePieceTokenizer) -> tuple[dict[str, Any], dict[str, Any]]:
    pieces, model_type, normalizer = _read_sentencepiece(model)
    names = [name for name, _, _ in pieces]
    specials = {name: i for i, (name, _, kind) in enumerate(pieces) if kind in (CONTROL, UNKNOWN)}
    unknown = next((i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), None)
    has_bytes = any(kind == BYTE for _, _, kind in pieces)
    if model_type == UNIGRAM:
        definition = {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [[name, score] for name, score in zip(names, _unigram_scores(pieces), strict=True)],
            "byte_fallback": has_bytes,
        }
    elif model_type == BPE:
        definition = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else names[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": has_bytes,
            "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": _merges(pieces),
        }
    else:
        raise ConfigError(
            f"the run's SentencePiece model is of type {model_type}, and only unigram and BPE models can be written as "
            f"a tokenizer.json: use one of these"
        )
    steps: list[dict[str, Any]] = []
    if normalizer["charsmap"]:
        charsmap = base64.b64encode(normalizer["charsmap"]).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if normalizer["remove_extra_whitespaces"]:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    prefix = normalizer["add_dummy_prefix"]
    if prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    undo: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        undo.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    eos, pad = names[tokenizer.eos_id], names[tokenizer.pad_id]
    result = _definition(
        specials,
        eos,
        definition,
        {"type": "Sequence", "normalizers": steps},
        None,
        {"type": "Sequence", "decoders": undo},
    )
    config = {"bos_token": eos, "eos_token": eos, "pad_token": pad} | NAMES_ARE_TEXT
    return result, config | ({} if unknown is None else {"unk_token": names[unknown]})


def _unigram_scores(pieces: list[tuple[str, float, int]]) -> list[float]:
    """Returns the scores by which tokenizers' search finds what SentencePiece's does, which treats kinds of pieces
    apart."""
    normal = [score for _, score, kind in pieces if kind == NORMAL]
    highest, lowest = max(normal), min(normal)
    # Never part of a best path, not even where a text spells the name out, as "<0x41>" does.
    never = 8 * (lowest - UNKNOWN_PENALTY)
    return [
        score if kind == NORMAL else len(name.encode()) * highest - 0.1 if kind == USER_DEFINED else never
        for name, score, kind in pieces
    ]


def _merges(pieces: list[tuple[str, float, int]]) -> list[list[str]]:
    """Returns the merges of a BPE model, best first: every way to make a piece of two others, by the piece's score."""
    known = {name: i for i, (name, _, kind) in enumerate(pieces) if kind in (NORMAL, USER_DEFINED)}
    merges = [
        (-score, known[name[:cut]], known[name[cut:]], [name[:cut], name[cut:]])
        for name, score, kind in pieces
        if kind == NORMAL
        for cut in range(1, len(name))
        if name[:cut] in known and name[cut:] in known
    ]
    return [pair for *_, pair in sorted(merges)]


def _read_sentencepiece(model: bytes) -> tuple[list[tuple[str, float, int]], int, dict[str, Any]]:
    """(name, score, type) of each piece, type of the model, and its normalisation, out of a .model file.

    The file is a protocol buffer; the few fields that matter are read here, without the library that would be needed.
    """
    pieces: list[tuple[str, float, int]] = []
    model_type = UNIGRAM
    normalizer = {"charsmap": b"", "add_dummy_prefix": True, "remove_extra_whitespaces": True}
    for field, value in _fields(model):
        if field == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, NORMAL)))
        elif field == 2:
            model_type = dict(_fields(value)).get(3, UNIGRAM)
        elif field == 3:
            names = {2: "charsmap", 3: "add_dummy_prefix", 4: "remove_extra_whitespaces"}
            normalizer |= {names[key]: item for key, item in _fields(value) if key in names}
    return pieces, model_type, normalizer


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protocol buffer: an int, or bytes for strings, messages and floats."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        yield number, message[at : at + size]
        at += size


# ---------------------------------------------------------------------------- tokenizer.json


def _definition(
    specials: dict[str, int],
    first: str,
    model: dict[str, Any],
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
) -> dict[str, Any]:
    """Returns a tokenizer.json; `first` is the special token that is put in front of a text."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name} | flags for name, i in specials.items()],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _beginning(first, specials[first]),
        "decoder": decoder,
        "model": model,
    }


def _beginning(name: str, id: int) -> dict[str, Any]:
    """Returns a post-processor that puts one token before a text, and before each of two."""
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    texts = [{"Sequence": {"id": which, "type_id": 0}} for which in ("A", "B")]
    return {
        "type": "TemplateProcessing",
        "single": [begin, texts[0]],
        "pair": [begin, texts[0], begin, texts[1]],
        "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]}},
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
