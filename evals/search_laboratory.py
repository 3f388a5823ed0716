"""A model, a space on it, its levels and texts, and plans to be compared; programs that measure searches share it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.calibration.whole import WholeModel
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.loading.teachers import TeacherFiles
from llmcompress.model.probe import map_model
from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.levels.bench import Bench
from llmcompress.plan_search.levels.build import build_levels
from llmcompress.plan_search.levels.store import LevelStore
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.space import Space
from llmcompress.progress import Silent

WINDOW = 256
SPACE = {
    "sites": {
        "dense": [],
        "int4": [{"gptq": {"scheme": "int4_g64"}}],
        "int3": [{"gptq": {"scheme": "int3_g64"}}],
        "int2": [{"gptq": {"scheme": "int2_g64"}}],
    },
    "per": "group",
    "bodies": {
        "whole": [],
        "ffn-75": [{"width": {"fraction": 0.25, "heads": False}}],
        "ffn-50": [{"width": {"fraction": 0.5, "heads": False}}],
    },
    "most_dropped": 0.2,
}
BITS = {"dense": 16.0, "int4": 4.25, "int3": 3.25, "int2": 2.25}
KEPT = {"whole": 1.0, "ffn-75": 0.75, "ffn-50": 0.5}


class Laboratory:
    """The model, its space and levels, and texts."""

    def __init__(self, model: str, texts: dict[str, str], scratch: Path) -> None:
        loaded = load_for_compression(find_source(model), dtype=torch.float32)
        self._tokenizer, self._texts = loaded.tokenizer, texts
        context = RunContext(
            self.windows("calibration", 128),
            storage_dtype=loaded.preflight.storage_dtype,
            teachers=TeacherFiles(model),
        )
        self.whole = WholeModel(loaded.model, map_model(loaded.model), context)
        self.space = PlanSpace(Space.model_validate(SPACE), self.whole.map)
        self._store = LevelStore(scratch)

    def windows(self, text: str, count: int) -> Tensor:
        """N×T of a text, with BOS."""
        settings = Calibration(source=self._texts[text], samples=count, tokens=WINDOW)
        made = calibration_windows(settings, self._tokenizer, max_positions=WINDOW, seed=0, progress=Silent())
        return made.windows_NT

    @cached_property
    def bench(self) -> Bench:
        """Of all levels."""
        build_levels(self.whole, self.space, self._store)
        return Bench(self.whole, self.space, self._store).__enter__()

    @property
    def estimate(self) -> Additive:
        """Gradient × error, from the stream that made the levels."""
        return self._store.losses(self.space)

    def dense_linears(self, plan: Plan) -> Plan:
        """The same shapes with dense linears."""
        units = zip(self.space.units, plan, strict=True)
        return self.space.canonical(tuple(0 if unit.kind == "sites" else choice for unit, choice in units))

    def compressed(self, count: int, seed: int) -> list[Plan]:
        """Random plans with no dense linears."""
        random, found = np.random.default_rng(seed), dict[Plan, None]()
        while len(found) < count:
            plan = list(self.space.random(random))
            for index, unit in enumerate(self.space.units):
                if unit.kind == "sites" and plan[index] == 0:
                    plan[index] = int(random.integers(1, len(unit.options)))
            found[self.space.canonical(tuple(plan))] = None
        return list(found)

    def of_one_size(self, count: int, seed: int, *, bits: float = 2.6, within: float = 0.01) -> list[Plan]:
        """Random plans whose linears take so many bits per weight of the dense model, nearly."""
        weights = sum(site.outputs * site.inputs for info in self.whole.map.blocks for site in info.structure.sites)
        found: dict[Plan, None] = {}
        while len(found) < count:
            drawn = self.compressed(500, seed)
            found |= {plan: None for plan in drawn if abs(self._bits(plan) / weights / bits - 1) < within}
            seed += 1_000
        return list(found)[:count]

    def _bits(self, plan: Plan) -> float:
        total, sizes = 0.0, self.whole.map.blocks[0].structure
        for unit, choice in zip(self.space.units, plan, strict=True):
            if unit.body is not None and not self.space.is_dropped(plan, unit.body):
                body = KEPT[self.space.units[unit.body].options[plan[unit.body]]]
                for name in unit.sites:
                    site = sizes.site(name)
                    total += (body if "mlp" in name else 1.0) * site.outputs * site.inputs * BITS[unit.options[choice]]
        return total
