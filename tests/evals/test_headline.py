"""The headline table shows what its result file holds, and says `unavailable` where nothing could be read."""

from __future__ import annotations

from typing import Any

from tables.headline import headline


def cost(decode: float, joules: float | None) -> dict[str, Any]:
    rate = {"median": decode, "turns": [decode * 0.9, decode, decode * 1.1]}
    return {
        "bytes_on_disk": 90_000_000,
        "speed": {"prefill": rate, "decode": rate},
        "memory": {"running": 700_000_000},
        "energy": {"decode_joules_per_token": joules},
    }


def facts() -> dict[str, Any]:
    change = {"mean": -0.02, "standard_error": 0.01}
    tasks = [{"task": name, "dense": 0.5, "compressed": 0.48, "change": change} for name in ("arc_easy", "piqa")]
    divergence = {"kl": {"mean": 0.02}, "same_top": {"mean": 0.91}}
    quality = [
        {"dense": 20.0, "compressed": 21.0, "ratio_error": 0.004, "divergence": divergence},
        {"dense": 10.0, "compressed": 10.4, "ratio_error": None, "divergence": divergence},
    ]
    row = {
        "preset": "w4",
        "runner": "torch",
        "quality": quality,
        "tasks": {"comparisons": tasks},
        "cost": [cost(30, None), cost(60, 0.125)],
    }
    return {
        "model": "m",
        "texts": ["WikiText-2", "books"],
        "window": 512,
        "bos": True,
        "limit": 200,
        "calibration": {"source": "valid.txt", "samples": 16, "tokens": 512},
        "speed": {"prompt": 128, "new": 48, "turns": 3, "threads": 1},
        "versions": {"torch": "2"},
        "machine": {"cpu": "c", "cores": "2"},
        "rows": [row],
    }


def test_every_column_of_a_row() -> None:
    _, head, _, dense, row = [line for line in headline(facts()).splitlines() if line][:5]
    assert head.count("|") == dense.count("|") == row.count("|")
    assert [cell.strip() for cell in dense.split("|")[1:-1]] == [
        "dense", "torch", "90", "20.00", "10.00", "", "", "50.0%", "30.0", "30.0", "700", "unavailable",
    ]  # fmt: skip
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "`w4`", "torch", "90", "21.00, ×1.050 ± 0.004", "10.40, ×1.040", "0.0200", "91.0%", "48.0%, -2.0% ± 1.4%",
        "60.0, ×2.00", "60.0, ×2.00", "700", "0.125",
    ]  # fmt: skip


def test_no_row_is_no_table() -> None:
    assert headline({**facts(), "rows": []}) == ""
