"""Fallbacks that a pass used on many sites, told once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmcompress.records.rows import SiteReport

KINDS_NAMED = 6


def degraded_warnings(rows: Sequence[SiteReport]) -> list[str]:
    """`gptq, 35 of 210 sites: damping raised to 0.1 (q_proj ×20, k_proj ×15)`: a line for each pass and reason."""
    touched = {algorithm: len({row.site for row in rows if row.algorithm == algorithm}) for algorithm in _passes(rows)}
    grouped: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.degraded:
            grouped.setdefault((row.algorithm, row.degraded), []).append(row.site)
    return [
        f"{algorithm}, {len(set(sites))} of {touched[algorithm]} sites: {reason} ({_kinds(sites)})"
        for (algorithm, reason), sites in grouped.items()
    ]


def _passes(rows: Sequence[SiteReport]) -> list[str]:
    return list(dict.fromkeys(row.algorithm for row in rows))


def _kinds(sites: Sequence[str]) -> str:
    """One site by its name; of several how many end in what."""
    if len(sites) == 1:
        return sites[0]
    counts = Counter(site.rpartition(".")[2] for site in sites).most_common()
    shown = ", ".join(f"{kind} ×{count}" for kind, count in counts[:KINDS_NAMED])
    return shown if len(counts) <= KINDS_NAMED else f"{shown}, {len(counts) - KINDS_NAMED} more"
