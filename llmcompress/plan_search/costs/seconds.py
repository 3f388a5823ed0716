"""Seconds of every plan, summed from a table that was measured on the device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llmcompress.errors import CompressError, ExitCode
from llmcompress.passes.base import PASSES
from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.costs.forms import DENSE, Form, Forms, Matrix, bodies_of
from llmcompress.plan_search.costs.latency_table import LatencyTable, Seconds
from llmcompress.plan_search.plan_space import PlanSpace, Unit
from llmcompress.plan_search.space import DROPPED, Passes

Phase = Callable[[Seconds], float]


def seconds_of(space: PlanSpace, table: LatencyTable, *, forms: Forms | None = None) -> dict[str, Additive]:
    """`prefill` and `decode`, both in seconds per token: of the prompt, and of what is generated after it.

    Raises: CompressError where the table lacks something that a plan may have.
    """
    forms = forms or Forms(space)
    tokens = table.batch * table.context
    return {
        "prefill": _additive(space, table, forms, lambda each: each.prefill / tokens),
        "decode": _additive(space, table, forms, lambda each: each.decode / table.batch),
    }


def wanted_matrices(space: PlanSpace, forms: Forms) -> tuple[tuple[Matrix, ...], tuple[Matrix, ...]]:
    """The products of linears, and output heads, that plans may have; dense ones too."""
    found = {
        matrix: None
        for unit in space.units
        if unit.body is not None
        for body in bodies_of(space.units[unit.body])
        for option in unit.options
        for form in forms.of(unit, body, option)
        for matrix in (Matrix(form.site.outputs, form.site.inputs), *form.matrices)
    }
    return tuple(sorted(found)), tuple(heads_of(space))


def heads_of(space: PlanSpace) -> dict[Matrix, Passes]:
    """The output heads that plans may have, and what makes them."""
    return {
        head_of(space, passes): tuple(each for each in passes if each.head_scheme(None, space.model_map) is not None)
        for passes in space.space.after.values()
    }


def head_of(space: PlanSpace, passes: Passes) -> Matrix:
    """The output head after these passes."""
    scheme: str | None = None
    for each in passes:
        scheme = each.head_scheme(scheme, space.model_map)
    return Matrix(space.model_map.vocabulary, space.model_map.hidden_size, scheme or DENSE)


def _additive(space: PlanSpace, table: LatencyTable, forms: Forms, phase: Phase) -> Additive:
    of_unit: dict[int, np.ndarray] = {}
    of_sites: dict[int, np.ndarray] = {}
    for index, unit in enumerate(space.units):
        if unit.kind == "before":
            for option in unit.options:
                _check_before(space, space.space.before[option])
            of_unit[index] = np.zeros(len(unit.options))
        elif unit.kind == "after":
            heads = (head_of(space, space.space.after[option]) for option in unit.options)
            of_unit[index] = np.array([phase(table.head(head).seconds) for head in heads])
        elif unit.kind == "body":
            of_unit[index] = np.array([_rest(unit, option, table, forms, phase) for option in unit.options])
        else:
            assert unit.body is not None
            of_sites[index] = np.array(
                [
                    [
                        sum(phase(_product(form, table)) for form in forms.of(unit, body, option))
                        for option in unit.options
                    ]
                    for body in bodies_of(space.units[unit.body])
                ]
            )
    return Additive(phase(table.outside), of_unit, of_sites)


def _rest(unit: Unit, option: str, table: LatencyTable, forms: Forms, phase: Phase) -> float:
    if option == DROPPED:
        return 0.0
    return sum(phase(table.rest(forms.blocks[index, option]).seconds) for index in unit.blocks)


def _product(form: Form, table: LatencyTable) -> Seconds:
    first, *others = (table.product(matrix).seconds for matrix in form.matrices)
    for each in others:
        first = first.plus(each)
    return first


def _check_before(space: PlanSpace, passes: Passes) -> None:
    names = space.model_map.site_names()
    for each in passes:
        if "shapes" in each.traits() or any(each.names_after(name) != (name,) for name in names):
            raise CompressError(
                "search.costs.whole",
                f"`{PASSES.name_of(type(each))}` changes what all blocks compute, so seconds are no sum any more",
                fix="compress the model with it first, and search on the result",
                exit_code=ExitCode.USAGE,
            )
