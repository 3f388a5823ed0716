"""A real model, a space on it, its levels and texts: what the rows of `search.py` have in common.

N = windows, T = tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.calibration.whole import WholeModel
from llmcompress.known_model import known_model
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.probe import map_model
from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.costs.file_bytes import bytes_of
from llmcompress.plan_search.costs.latency_table import LatencyTable
from llmcompress.plan_search.costs.seconds import seconds_of
from llmcompress.plan_search.levels.bench import Bench
from llmcompress.plan_search.levels.build import build_levels
from llmcompress.plan_search.levels.store import LevelStore
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.problem import Relaxation
from llmcompress.plan_search.space import Space
from llmcompress.progress import Silent

WINDOW = 512
STAGES = (2048, 4096)
TESTED = 10
"""Windows of every test text."""
GROUP = 64
SETTINGS: dict[str, Any] = {"save": {"format": "llmcompress"}}
SPACE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("search_space.yaml").read_text(encoding="utf-8"))
FAMILIES: dict[str, dict[str, Any]] = {
    "bits": {"bodies": {"whole": []}, "most_dropped": 0.0},
    "bits and width": {"most_dropped": 0.0},
    "bits and depth": {"bodies": {"whole": []}},
    "joint": {},
    "width": {"sites": {"int8": SPACE["sites"]["int8"]}, "most_dropped": 0.0},
    "depth": {"sites": {"int8": SPACE["sites"]["int8"]}, "bodies": {"whole": []}},
}
"""What each may choose; where bits are not chosen, all linears have 8."""


class Counted(Relaxation):
    """Adds up the tokens of a relaxation, whose own are forward ones, half of them on the way back; a backward pass
    counts as two forward passes."""

    def __init__(self, inner: Relaxation) -> None:
        self._inner, self.tokens, self.spent = inner, inner.tokens, 0

    def loss_and_gradient(self, mixture: Sequence[Any], step: int) -> tuple[float, list[Any]]:
        """As the inner one."""
        self.spent += 2 * self.tokens
        return self._inner.loss_and_gradient(mixture, step)


class Setting:
    """The model, its levels and the texts."""

    def __init__(
        self,
        model: Path,
        calibration: Path,
        judge: Path,
        texts: Mapping[str, Path],
        *,
        store: Path,
        latency: LatencyTable | None,
    ) -> None:
        loaded = load_for_compression(find_source(str(model)))
        self.tokenizer, self.known = loaded.tokenizer, known_model(find_source(str(model)))
        self.map, self._latency = map_model(loaded.model), latency
        context = RunContext(
            self.windows(calibration, 16), batch=8, storage_dtype=loaded.preflight.storage_dtype, progress=Silent()
        )
        whole = WholeModel(loaded.model, self.map, context)
        one_by_one = whole.within(replace(context, batch=1))
        self.space = self.family("joint")
        self.store = build_levels(whole, self.space, LevelStore(store))
        self.bench = Bench(whole, self.space, self.store)
        self._relaxed = {name: Bench(one_by_one, self.family(name), self.store) for name in FAMILIES}
        self._judged_NT = self.windows(judge, STAGES[-1] // WINDOW)
        self._tests = {name: self.windows(path, TESTED) for name, path in texts.items()}

    def windows(self, text: Path, count: int) -> Tensor:
        """N×T."""
        settings = Calibration(source=str(text), samples=count, tokens=WINDOW)
        return calibration_windows(settings, self.tokenizer, max_positions=WINDOW, seed=0, progress=Silent()).windows_NT

    def family(self, name: str) -> PlanSpace:
        """The part of the space that a family searches."""
        return PlanSpace(Space.model_validate({**SPACE, **FAMILIES[name]}), self.map)

    def costs(self, space: PlanSpace) -> dict[str, Additive]:
        """Bytes of the files, and seconds per token of decoding where a table was measured."""
        found = {"bytes": bytes_of(space, self.known, SETTINGS)}
        return found if self._latency is None else {**found, "decode": seconds_of(space, self._latency)["decode"]}

    def bytes_limit(self, average: float) -> float:
        """Bytes of a model whose blocks have so many bits per weight, and everything else as in every plan."""
        costs = self.costs(self.space)["bytes"]
        known = {bits: costs.total(self.space, self.space.uniform(f"int{bits}", after="int8")) for bits in (2, 4)}
        slope = (known[4] - known[2]) / 2.0
        return known[2] + slope * (average - (2 + 16 / GROUP))

    def decode_limit(self, part: float) -> float:
        """Seconds per token, as a part of what uniform 4 bits take."""
        return part * self.costs(self.space)["decode"].total(self.space, self.space.uniform("int4", after="int8"))

    def relaxation(self, family: str) -> Counted:
        """A gradient is of one window of the text for the first stage, another in every step."""
        bench = self._relaxed[family]
        return Counted(bench.relaxation(bench.text(self._judged_NT[: STAGES[0] // WINDOW])))

    def judged(self, plan: Plan, tokens: int) -> float:
        """Mean KL on the first windows of the judging text."""
        return float(self.bench.divergences(plan, self.bench.text(self._judged_NT[: tokens // WINDOW])).mean())

    def in_space(self, space: PlanSpace, plan: Plan) -> Plan:
        """A plan of a family as one of the whole space."""
        return self.space.plan(space.chosen(plan))

    def described(self, plan: Plan) -> dict[str, Any]:
        """A plan and everything that is measured of it."""
        return {
            "chosen": self.space.chosen(plan),
            **{axis: each.total(self.space, plan) for axis, each in self.costs(self.space).items()},
            "judged": self.judged(plan, STAGES[-1]),
            "tested": {
                name: self.bench.divergences(plan, self.bench.text(windows_NT)).tolist()
                for name, windows_NT in self._tests.items()
            },
        }
