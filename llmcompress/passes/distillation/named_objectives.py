"""Objectives as a recipe writes them: `{name: {option: value}}`, several of which are added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from llmcompress.training.objectives.base import OBJECTIVES, Objective
from llmcompress.training.objectives.combined import Combined
from llmcompress.training.objectives.divergence import Divergence


def objectives_of(named: Mapping[str, Mapping[str, Any]]) -> list[Objective]:
    """Objects with these options.

    Raises: ValueError when there is no such objective or option.
    """
    if not named:
        raise ValueError("name at least one objective, e.g. {kl: {}}")
    found: list[Objective] = []
    for name, options in named.items():
        cls = OBJECTIVES[name]
        assert issubclass(cls, BaseModel), "registered objectives have their options as fields"
        made = cls.model_validate(options)
        assert isinstance(made, Objective)
        found.append(made)
    return found


def combined(objectives: Sequence[Objective]) -> Objective:
    """Their sum; one alone as it is."""
    return objectives[0] if len(objectives) == 1 else Combined(objectives)


def temperature_of(objectives: Sequence[Objective]) -> float:
    """Of the divergences, at which a teacher must be stored; 1 where there are none.

    Raises: ValueError when there are two.
    """
    found = sorted({each.temperature for each in objectives if isinstance(each, Divergence)})
    if len(found) > 1:
        raise ValueError(f"a stored teacher has one temperature, and the objectives have {found[0]:g} and {found[1]:g}")
    return found[0] if found else 1.0
