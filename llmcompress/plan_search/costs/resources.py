"""Peak memory and energy of every plan, from a table that was measured on the device.

Memory: what the runtime holds of every linear; of blocks and libraries, what small models took. Energy: seconds times
the power above idle that a counter showed while a small model ran, taken to be the same for all plans of the model.
"""

from __future__ import annotations

import numpy as np

from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.costs.forms import Forms, bodies_of
from llmcompress.plan_search.costs.latency_table import LatencyTable
from llmcompress.plan_search.costs.seconds import head_of, seconds_of
from llmcompress.plan_search.plan_space import PlanSpace, Unit
from llmcompress.plan_search.space import DROPPED


def memory_of(space: PlanSpace, table: LatencyTable, *, forms: Forms | None = None) -> Additive | None:
    """Peak bytes of a process that runs a plan, libraries included; None where the table has no memory.

    Raises: CompressError where the table lacks something that a plan may have.
    """
    if table.outside_bytes is None:
        return None
    forms = forms or Forms(space)
    of_unit: dict[int, np.ndarray] = {}
    of_sites: dict[int, np.ndarray] = {}
    for index, unit in enumerate(space.units):
        if unit.kind == "before":
            of_unit[index] = np.zeros(len(unit.options))
        elif unit.kind == "after":
            heads = (head_of(space, space.space.after[option]) for option in unit.options)
            of_unit[index] = np.array([float(table.head(head).bytes) for head in heads])
        elif unit.kind == "body":
            of_unit[index] = np.array([_rest(unit, option, table, forms) for option in unit.options])
        else:
            assert unit.body is not None
            bodies = bodies_of(space.units[unit.body])
            held = [[_held(unit, body, option, table, forms) for option in unit.options] for body in bodies]
            of_sites[index] = np.array(held)
    return Additive(float(table.outside_bytes), of_unit, of_sites)


def energy_of(space: PlanSpace, table: LatencyTable, *, forms: Forms | None = None) -> Additive | None:
    """Joules per generated token above idle; None where no counter could be read when the table was measured."""
    if table.power is None:
        return None
    seconds = seconds_of(space, table, forms=forms)["decode"]
    nothing = Additive(0.0, {}, {index: np.zeros_like(each) for index, each in seconds.of_sites.items()})
    return nothing.plus(seconds, table.power.decode)


def _rest(unit: Unit, option: str, table: LatencyTable, forms: Forms) -> float:
    if option == DROPPED:
        return 0.0
    return float(sum(table.rest(forms.blocks[index, option]).bytes or 0 for index in unit.blocks))


def _held(unit: Unit, body: str, option: str, table: LatencyTable, forms: Forms) -> float:
    matrices = (matrix for form in forms.of(unit, body, option) for matrix in form.matrices)
    return float(sum(table.product(matrix).bytes for matrix in matrices))
