"""A tokenizer as GGUF's metadata: byte-level BPE by its merges, SentencePiece-like BPE by the scores of its tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmcompress.errors import CompressError
from llmcompress.exporters.gguf_architectures import Setting

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""Kinds of tokens, as llama.cpp numbers them."""

_SPACE = "▁"
_LOW_SCORE = -1e6
"""Of tokens that no merge makes: they are merged last."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LATTER = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LATTER_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"

_PRE_TOKENIZERS: Mapping[tuple[str, bool], str] = {
    ("", False): "gpt-2",
    (r"\p{N}", False): "smollm",
    (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _LATTER, True): "llama-bpe",
    (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _LATTER, False): "qwen2",
    ("|".join(_WORDS) + r"|\p{N}" + _LATTER_SLASH, True): "tekken",
    (f"{_CONTRACTIONS}?|".join(_WORDS) + rf"{_CONTRACTIONS}?|\p{{N}}{{1,3}}" + _LATTER_SLASH, False): "gpt-4o",
}
"""How the text is split first (besides, or for the last four in the place of, GPT-2's expression), and whether a whole
word that is a token is taken without merging → what llama.cpp calls it."""


def tokenizer_settings(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Setting]:
    """All keys of the metadata below `tokenizer`; `rows` are the embedding's, and every one gets a token.

    Raises: CompressError for a tokenizer that llama.cpp does not compute: another text would reach the model.
    """
    described = _description(tokenizer)
    model = described["model"]
    if model.get("type") != "BPE":
        raise _refused(f"a tokenizer of the kind {model.get('type')}")
    steps = _steps(described.get("pre_tokenizer"))
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    found = _byte_level(described, steps) if byte_level else _sentencepiece(described, steps)
    tokens, kinds = _tokens(described, rows, byte_level=byte_level)
    found |= {"ggml.tokens": tokens, "ggml.token_type": kinds, **_special(tokenizer)}
    if not byte_level:
        found["ggml.scores"] = _scores(tokens, model["merges"])
    if isinstance(tokenizer.chat_template, str):
        found["chat_template"] = tokenizer.chat_template
    return {f"tokenizer.{key}": value for key, value in found.items()}


def _description(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("a tokenizer without tokenizer.json")
    described: dict[str, Any] = json.loads(backend.to_str())
    return described


def _byte_level(described: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> dict[str, Setting]:
    model = described["model"]
    normalizers = [step["type"] for step in _steps(described.get("normalizer"))]
    if set(normalizers) - {"NFC"}:  # Qwen's, which llama.cpp's own files leave out too
        raise _refused(f"a byte-level tokenizer that changes the text by {normalizers[0]}")
    if any(step.get("add_prefix_space") for step in steps):
        raise _refused("a byte-level tokenizer that adds a space before the text")
    expression = _expression(steps)
    name = _PRE_TOKENIZERS.get((expression, bool(model.get("ignore_merges"))))
    if name is None:
        raise _refused(f"text split by the expression {expression!r}")
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    return {"ggml.model": "gpt2", "ggml.pre": name, "ggml.merges": merges}


def _expression(steps: Sequence[Mapping[str, Any]]) -> str:
    """By which the text is split: `""` is GPT-2's own, which a byte-level step brings along."""
    last = steps[-1]
    before = list(steps[:-1])
    if last["type"] != "ByteLevel" or len(before) > 1:
        raise _refused("text split by " + ", ".join(str(step["type"]) for step in steps))
    if not before:
        return "" if last.get("use_regex", True) else "no expression"
    (step,) = before
    if step["type"] == "Digits" and step.get("individual_digits") and last.get("use_regex", True):
        return r"\p{N}"
    pattern = step.get("pattern", {}).get("Regex")
    if step["type"] == "Split" and pattern and step.get("behavior") == "Isolated" and not last.get("use_regex", True):
        return str(pattern)
    raise _refused(f"text split by {step['type']}")


def _sentencepiece(described: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> dict[str, Setting]:
    normalizers = _steps(described.get("normalizer"))
    kinds = {step["type"] for step in (*normalizers, *steps)}
    marks = _SPACE in json.dumps([*normalizers, *steps], ensure_ascii=False)
    if not marks or not described["model"].get("byte_fallback") or kinds - {"Prepend", "Replace", "Metaspace", "Split"}:
        raise _refused("a BPE tokenizer that is neither byte-level nor SentencePiece-like")
    prepends = any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in (*normalizers, *steps)
    )
    return {"ggml.model": "llama", "ggml.pre": "default", "ggml.add_space_prefix": prepends}


def _tokens(described: Mapping[str, Any], rows: int, *, byte_level: bool) -> tuple[list[str], list[int]]:
    """Texts and kinds, by number; a row without a token gets a name that no text has."""
    model = described["model"]
    tokens = [f"[PAD{number}]" for number in range(rows)]
    kinds = [_UNUSED] * rows
    for text, number in model["vocab"].items():
        if number < rows:
            is_byte = not byte_level and re.fullmatch(r"<0x[0-9A-F]{2}>", text)
            tokens[number], kinds[number] = text, _BYTE if is_byte else _NORMAL
    for added in described.get("added_tokens", ()):
        if added["id"] < rows:
            text = added["content"]
            spaced = text if byte_level or added["special"] else text.replace(_SPACE, " ")
            tokens[added["id"]], kinds[added["id"]] = spaced, _CONTROL if added["special"] else _USER_DEFINED
    unknown = model["vocab"].get(model.get("unk_token")) if model.get("unk_token") else None
    if unknown is not None and unknown < rows and not byte_level:
        kinds[unknown] = _UNKNOWN
    return tokens, kinds


def _scores(tokens: Sequence[str], merges: Sequence[Any]) -> list[float]:
    """What is merged first has the highest score: the place of a token's first merge, negated."""
    places: dict[str, int] = {}
    for place, merge in enumerate(merges):
        text = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        places.setdefault(text, place)
    return [-float(places[text]) if text in places else _LOW_SCORE for text in tokens]


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, Setting]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    numbers = {key: getattr(tokenizer, f"{name}_token_id") for name, key in names.items()}
    found: dict[str, Setting] = {
        f"ggml.{key}_token_id": int(number) for key, number in numbers.items() if number is not None
    }
    ids = tokenizer("a")["input_ids"]
    found["ggml.add_bos_token"] = bool(ids) and ids[0] == tokenizer.bos_token_id
    found["ggml.add_eos_token"] = bool(ids) and ids[-1] == tokenizer.eos_token_id
    return found


def _steps(described: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list."""
    if described is None:
        return []
    inner = described.get("pretokenizers", described.get("normalizers"))
    return [described] if inner is None else [step for each in inner for step in _steps(each)]


def _refused(what: str) -> CompressError:
    return CompressError(
        "export.tokenizer",
        f"GGUF cannot represent the tokenizer: llama.cpp does not compute {what}",
        fix="export to another format; with its token ids llama.cpp could run the model, but not read its texts",
    )
