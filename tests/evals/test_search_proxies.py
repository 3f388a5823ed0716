"""The tables of proxies state texts, τ with its error, and what was expected beside what was measured."""

from __future__ import annotations

from tables import search_proxies

MADE = {"versions": {"torch": "2.13.0"}, "machine": {"cpu": "a processor", "cores": "2"}}


def test_every_table_shows_what_was_measured_and_leaves_out_what_was_not():
    row = {"tau": 0.712, "error": 0.05, "count": 8}
    law = {"floor": 0.1, "amount": 30.0, "exponent": 0.5, "error": 0.01}
    facts = {
        "model": "m",
        "space": {"sites": {"int4": [], "int3": []}, "bodies": {"whole": []}},
        "texts": {"calibration": "a.txt", "judge": "b.txt", "text": "c.txt"},
        "window": 256,
        "training": {"steps": 80, "batch": 2},
        **MADE,
    }
    assert "τ" not in search_proxies.proxies(facts).split("\n\n", 1)[1]
    shown = search_proxies.proxies(
        {
            **facts,
            "stages": {"2048 tokens": row},
            "predictors": {"gp, 40 plans, from nothing, of one size": row, "sums, all over the space": row},
            "recovery": {"joint: flash": row},
            "seconds_per_plan": {"joint: flash": 2.34, "joint: distilled": 40.2},
            "scaling": {
                "plan 0": {"law": law, "measured": {"6": 0.5, "120": 0.25}, "expected": {"6": 0.5, "120": 0.26}}
            },
        }
    )
    assert "| 2,048 tokens | 0.71 ± 0.05 | 8 |" in shown
    assert "| learned from | from nothing | from sums |" in shown
    assert "| gp, 40 plans | – / 0.71 | – |" in shown and "| the estimate alone | – | 0.71 / – |" in shown
    assert "| flash distillation | 0.71 ± 0.05 | 2.3 |" in shown and "40 CPU seconds per plan, on 8 plans" in shown
    assert "| plan 0 | 0.100 + 30 / N^0.50 | 0.260 | 0.250 |" in shown and "after 120 (61,440 tokens)" in shown
    assert "`a.txt`" in shown and "`c.txt`" in shown
