"""Plans as paths and as graphs, in the role that encodings have in architecture search; both lead back to the plan.

N = plans, P = possible path pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmcompress.plan_search.plan_space import Plan, PlanSpace


@dataclass(frozen=True, eq=False)
class PathEncoding:
    """1 for every piece of path that a token takes: the choices of two neighbouring units of one block.

    A block's units are passed in order: its body, then its sites. Pieces of two are the shortest paths that still
    tell which choices stand together; whole paths would be exponentially many.
    Source: White et al., BANANAS, arXiv 1910.11858, section 3, whose path encoding is cut to short paths too.
    """

    space: PlanSpace

    @cached_property
    def pieces(self) -> tuple[tuple[int, int, int, int], ...]:
        """Unit, option, next unit, its option. A unit without a neighbour stands for itself."""
        return tuple(
            (one, choice, other, next_choice)
            for one, other in self._neighbours()
            for choice in range(len(self.space.units[one].options))
            for next_choice in (range(len(self.space.units[other].options)) if other != one else (choice,))
        )

    def _neighbours(self) -> Iterator[tuple[int, int]]:
        for index, unit in enumerate(self.space.units):
            if unit.body is None:
                inside = self.space.inside(index) if unit.kind == "body" else ()
                yield from zip((index, *inside), inside, strict=False)
                if not inside:
                    yield index, index

    def encode(self, plans: Sequence[Plan]) -> np.ndarray:
        """N × P. Of a dropped block there is no path; which body it has shows in that."""
        place = {piece: column for column, piece in enumerate(self.pieces)}
        neighbours = list(self._neighbours())
        found = np.zeros((len(plans), len(place)))
        for row, plan in enumerate(plans):
            for one, other in neighbours:
                unit = self.space.units[other]
                if unit.body is None or not self.space.is_dropped(plan, unit.body):
                    found[row, place[one, plan[one], other, plan[other]]] = 1.0
        return found

    def decode(self, row: np.ndarray) -> Plan:
        """The plan again."""
        units = self.space.units
        found = [len(unit.options) - 1 if unit.kind == "body" else 0 for unit in units]
        for column in np.flatnonzero(row):
            one, choice, other, next_choice = self.pieces[column]
            found[one], found[other] = choice, next_choice
        return self.space.canonical(tuple(found))


@dataclass(frozen=True)
class Graph:
    """A directed graph with one node for every choice that is made, as NAS-Bench-101 has cells."""

    nodes: tuple[tuple[str, str], ...]
    """Unit and option, by name; dropped blocks have none."""
    edges: tuple[tuple[int, int], ...]
    """From node to node, in the order of the flow: `before`, blocks, `after`."""

    def adjacency(self) -> np.ndarray:
        """1 where an edge leads from row to column."""
        found = np.zeros((len(self.nodes), len(self.nodes)))
        for start, end in self.edges:
            found[start, end] = 1.0
        return found


def graph_of(space: PlanSpace, plan: Plan) -> Graph:
    """The graph of a plan. What is decided for several blocks at once stands once, where the first of them does."""
    bodies = [index if unit.kind == "body" else unit.body for index, unit in enumerate(space.units)]
    kept = [index for index, body in enumerate(bodies) if body is None or not space.is_dropped(plan, body)]
    chosen = space.chosen(plan)
    names = list(chosen)
    nodes = tuple((names[index], chosen[names[index]]) for index in kept)
    return Graph(nodes, tuple((place, place + 1) for place in range(len(nodes) - 1)))


def plan_of(space: PlanSpace, graph: Graph) -> Plan:
    """The plan of a graph: units without a node belong to dropped blocks."""
    named = dict(graph.nodes)
    whole = space.chosen((0,) * len(space.units))
    dropped = {
        name: unit.options[-1]
        for name, unit in zip(whole, space.units, strict=True)
        if unit.kind == "body" and name not in named
    }
    return space.canonical(space.plan({**named, **dropped}))
