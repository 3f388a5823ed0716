"""`LevelStore`: the levels of a space on one model, and what was estimated while they were made."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.levels.block_levels import StoredBlock
from llmcompress.plan_search.levels.folder import LevelFolder, block_key
from llmcompress.plan_search.plan_space import PlanSpace, Unit


class LevelStore(LevelFolder):
    """Built by `build_levels`, which fills it block by block."""

    def block(self, index: int, *, before: int = 0) -> StoredBlock:
        """Levels of one block; `before` is the place of a choice among those of the space.

        Raises: CompressError when that block is not finished.
        """
        return StoredBlock(self.file(block_key(before, index)))

    def losses(self, space: PlanSpace) -> Additive:
        """Estimated mean divergence per token, in nats, as a sum over units (see losses.py): of the model after the
        first choice of `before`. Choices of `before` and `after` add nothing."""
        blocks = [self.block(info.index) for info in space.model_map.blocks]
        of_unit: dict[int, np.ndarray] = {}
        of_sites: dict[int, np.ndarray] = {}
        for index, unit in enumerate(space.units):
            if unit.kind == "body":
                found = [sum(blocks[block].body_losses[option] for block in unit.blocks) for option in unit.options]
                of_unit[index] = np.array(found)
            elif unit.kind == "sites":
                per_body = [
                    sum(_of_options(blocks[block].losses(body), unit) for block in unit.blocks)
                    for body in space.space.bodies
                ]
                of_sites[index] = np.array(per_body)
        return Additive(0.0, of_unit, of_sites)


def _of_options(losses: Mapping[str, Mapping[str, float]], unit: Unit) -> np.ndarray:
    """Of the unit's sites together, option by option; an option that changes nothing loses nothing."""
    rows = [[losses.get(site, {}).get(option, 0.0) for option in unit.options] for site in unit.sites]
    found: np.ndarray = np.array(rows).sum(0)
    return found
