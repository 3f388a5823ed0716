"""Which part of the large products runs: always a core, and what this commit's turn is.

Passes × families and presets × devices take a third of the time and fail together: a fault that is in one family alone
is found by its turn within a few commits, and by `--all` before that. What has its turn depends on the commit alone, so
two runs of one commit run the same tests, and a red one can be repeated.
"""

from __future__ import annotations

import random
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent

CORE = ("llama_gqa", "llama_odd", "gpt2", "opt", "phi3", "qwen3_moe")
"""Grouped heads with a tied head; odd sizes; Conv1D; biases; fused projections; experts."""
TURN = 4
"""Families beside the core."""
PRODUCTS = ("tests/passes/", "tests/training/")
"""Where a test of all families is one cell of a product. Elsewhere it asks about the family, and all of them run."""
PRODUCT_SIZE = 10
"""A test that names fewer families chose them."""
MAJORS = (
    "tests/model/",
    "tests/modules/",
    "tests/loading/",
    "tests/exporters/",
    "tests/hub/",
    "tests/calibration/test_experts.py",
)
"""What touches transformers' or huggingface_hub's own code, and therefore runs under the other major too."""


@dataclass(frozen=True)
class Selection:
    """What the options and the commit leave of the products."""

    commit: str
    families: str
    presets: str

    def chosen_families(self) -> set[str]:
        """The core, and those whose turn it is."""
        if self.families == "all":
            return set(FAMILIES)
        others = sorted(set(FAMILIES) - set(CORE))
        turn = random.Random(self.commit).sample(others, TURN) if self.families == "rotating" else []
        return {*CORE, *turn}

    def quarter(self, names: Sequence[str]) -> list[str]:
        """Every fourth name, beginning where the commit says; all of them with `--all`."""
        return list(names) if self.families == "all" else sorted(names)[self._turn() :: 4]

    def says(self) -> str:
        """For the reader of a run."""
        if self.families == "all":
            return "all families, all presets on every device"
        turn = ", ".join(sorted(self.chosen_families() - set(CORE))) or "no other"
        return (
            f"commit {self.commit[:12]}: passes ran on the core of families and {turn}; where a quarter of the presets "
            f"ran, it was number {self._turn() + 1} (--all runs everything)"
        )

    def _turn(self) -> int:
        return random.Random(self.commit).randrange(4)

    def deselect(self, items: list[pytest.Item]) -> list[pytest.Item]:
        """The items whose turn it is not."""
        families, chosen = families_of(items), self.chosen_families()
        every_preset = sorted({name for item in items if (name := parameter(item, "preset"))})
        presets = self.quarter(every_preset) if self.presets == "quarter" else every_preset

        def has_its_turn(item: pytest.Item) -> bool:
            preset = parameter(item, "preset")
            of_family = not is_product(item, families) or parameter(item, "family") in chosen
            return of_family and (preset is None or preset in presets)

        return [item for item in items if not has_its_turn(item)]


def mark_majors(items: list[pytest.Item]) -> None:
    """Mark what runs under both majors of transformers: their own code, every product and every preset."""
    families = families_of(items)
    for item in items:
        if item.nodeid.startswith(MAJORS) or is_product(item, families) or parameter(item, "preset"):
            item.add_marker("majors")


def other_major(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """What cannot run with the transformers that is installed: Optimum's exporters know 4.57 alone."""
    return (
        []
        if version("transformers").startswith("4.")
        else [each for each in items if each.get_closest_marker("transformers4")]
    )


def is_product(item: pytest.Item, families: dict[str, set[str]]) -> bool:
    """Whether a test is one of a product of passes and families."""
    wide = len(families[function(item)]) >= PRODUCT_SIZE
    return wide and item.nodeid.startswith(PRODUCTS) and not item.get_closest_marker("every_family")


def families_of(items: list[pytest.Item]) -> dict[str, set[str]]:
    """The families that each test function names."""
    found: dict[str, set[str]] = defaultdict(set)
    for item in items:
        if family := parameter(item, "family"):
            found[function(item)].add(family)
    return found


def function(item: pytest.Item) -> str:
    """The test without its parameters."""
    return item.nodeid.partition("[")[0]


def parameter(item: pytest.Item, name: str) -> str | None:
    """What a parametrized test was given."""
    call = getattr(item, "callspec", None)
    found = call.params.get(name) if call else None
    return found if isinstance(found, str) else None


def head_commit() -> str:
    """The commit that is checked out; the same word everywhere outside of a repository."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() or "no repository"
