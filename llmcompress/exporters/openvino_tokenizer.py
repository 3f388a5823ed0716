"""Rewrites a tokenizer for OpenVINO's converter, which cannot follow every way to say the same.

Tokenizers that were restored from a GGUF file decode by four steps, of which only the last does something to a
byte-level vocabulary; openvino_tokenizers 2026.4 fails on the second (`Fuse` in front of `ByteLevel`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
FILE = "tokenizer.json"


def simplify_decoder(folder: Path) -> None:
    """Rewrite `tokenizer.json` in a folder, if it is there and can be said more simply."""
    file = folder / FILE
    if file.is_file():
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(simplified(tokenizer), ensure_ascii=False), encoding="utf-8")


def simplified(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer; where every decoding step before a last `ByteLevel` does nothing, without them."""
    decoder = tokenizer.get("decoder") or {}
    steps = decoder.get("decoders", [])
    if len(steps) > 1 and steps[-1]["type"] == "ByteLevel":
        tokens = [*tokenizer["model"]["vocab"], *(each["content"] for each in tokenizer.get("added_tokens", []))]
        if all(_does_nothing(step, tokens) for step in steps[:-1]):
            return {**tokenizer, "decoder": steps[-1]}
    return dict(tokenizer)


def _does_nothing(step: Mapping[str, Any], tokens: list[str]) -> bool:
    """Whether it leaves the bytes alone that `ByteLevel` will make of these tokens."""
    if step["type"] == "Fuse":  # byte-level decoding joins them too
        return True
    if step["type"] == "ByteFallback":
        return not any(_BYTE.fullmatch(token) for token in tokens)
    pattern = str(step.get("pattern", {}).get("String", "")) if step["type"] == "Replace" else ""
    return not set(pattern) <= set("".join(tokens))
