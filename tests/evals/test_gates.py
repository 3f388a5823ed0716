"""Gates are recipes with a limit for every model that is measured."""

from __future__ import annotations

import json

import gates
import pytest

from llmcompress.recipe import parse_recipe

MODELS = {"books-llama", "smollm2-135m"}


@pytest.mark.parametrize("name", gates.gates())
def test_every_gate_has_passes_that_exist_and_a_limit_for_every_model(name: str) -> None:
    (gate,) = gates.gates((name,)).values()
    assert parse_recipe("passes: " + json.dumps(gate.passes), name).passes
    assert gate.at_most.keys() == MODELS and all(1 < limit < 10 for limit in gate.at_most.values())


def test_a_gate_is_kept_up_to_its_limit_and_where_there_is_none() -> None:
    found = {"gate": "a", "degraded": 0, "seconds": 1.0}
    assert gates.Measured(ratio=1.5, at_most=1.5, **found).kept and gates.Measured(ratio=9, at_most=None, **found).kept
    assert not gates.Measured(ratio=1.51, at_most=1.5, **found).kept
