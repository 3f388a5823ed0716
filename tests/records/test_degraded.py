"""Fallbacks of many sites are told in one line for each pass and reason."""

from llmcompress.records.degraded import degraded_warnings
from llmcompress.records.rows import SiteReport


def row(block: int, leaf: str, why: str | None, algorithm: str = "gptq") -> SiteReport:
    return SiteReport(site=f"model.layers.{block}.{leaf}", algorithm=algorithm, degraded=why)


def test_the_same_reason_is_told_once_with_what_it_happened_to():
    rows = [
        *(row(n, "q_proj", "damping raised to 0.1") for n in range(3)),
        *(row(n, "k_proj", "damping raised to 0.1" if n else None) for n in range(3)),
        row(0, "up_proj", "no tokens reached it"),
        row(0, "up_proj", None, algorithm="awq"),
    ]
    assert degraded_warnings(rows) == [
        "gptq, 5 of 7 sites: damping raised to 0.1 (q_proj ×3, k_proj ×2)",
        "gptq, 1 of 7 sites: no tokens reached it (model.layers.0.up_proj)",
    ]


def test_of_many_kinds_the_rest_is_counted():
    (line,) = degraded_warnings([row(n, f"part{n}", "zeros") for n in range(9)])
    assert line.endswith(", part5 ×1, 3 more)")
