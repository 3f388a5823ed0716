"""What llama.cpp reads and computes with a GGUF file, counted on its tensors; llama.cpp itself does not say.

B = sequences, T = tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.runners.work import Work

_CACHED = 2
"""Bytes of a number in the cache: keys and values are float16 by default."""
_EXPERTS = "_exps."
"""In the names of tensors that stack the matrices of all experts."""
_TABLE, _HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor, as the file's header describes it."""

    name: str
    bytes: int
    numbers: int
    rows: int
    """1: it is a vector."""


@dataclass(frozen=True)
class GgufHeader:
    """What counts of a file."""

    tensors: tuple[GgufTensor, ...]
    settings: Mapping[str, Any]
    """Of the architecture, without its name."""

    def work(self, batch: int, tokens: int) -> Work:
        """Of a prefill of B×T tokens whose last positions get logits, and of the decode step after it.

        Matrices are read whole; of an embedding that is not the head the B rows, of experts at most as many as B tokens
        choose. Attention is counted over the whole square and the whole text, as torch counts it, in blocks with a
        window too.
        """
        is_tied = all(each.name != _HEAD for each in self.tensors)
        used, experts = self.settings.get("expert_used_count", 1), self.settings.get("expert_count", 1)
        read = flops = 0
        for each in self.tensors:
            if each.name == _TABLE and not is_tied:
                read += batch * each.bytes // each.rows
            elif each.name in (_TABLE, _HEAD):
                read, flops = read + each.bytes, flops + 2 * each.numbers * batch
            elif _EXPERTS in each.name:
                read += each.bytes * min(experts, batch * used) // experts
                flops += 2 * each.numbers * used // experts * batch * tokens
            else:
                read, flops = read + each.bytes, flops + (2 * each.numbers * batch * tokens if each.rows > 1 else 0)
        numbers = self.settings["attention.key_length"] + self.settings["attention.value_length"]
        heads, kept = self._per_block("attention.head_count"), self._per_block("attention.head_count_kv")
        flops += 2 * sum(heads) * numbers * batch * tokens**2
        return Work(flops, read, batch * tokens * sum(kept) * numbers * _CACHED)

    def _per_block(self, name: str) -> list[int]:
        value = self.settings[name]
        return value if isinstance(value, list) else [value] * int(self.settings["block_count"])


def gguf_header(path: Path) -> GgufHeader | None:
    """Of that file; None without the package `gguf`."""
    try:
        from gguf import GGUFReader
    except ImportError:
        return None
    reader = GGUFReader(path)
    start = f"{reader.fields['general.architecture'].contents()}."
    fields = {name.removeprefix(start): each for name, each in reader.fields.items() if name.startswith(start)}
    tensors = (
        GgufTensor(str(each.name), int(each.n_bytes), int(each.n_elements), _rows(each.shape))
        for each in reader.tensors
    )
    return GgufHeader(tuple(tensors), {name: each.contents() for name, each in fields.items()})


def _rows(shape: Any) -> int:
    """The file has the inputs first."""
    return 1 if len(shape) == 1 else int(shape[-1])
