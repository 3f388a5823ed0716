"""Learned gates on heads and FFN channels, trained briefly and folded into the weights; closed units are removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.map import ModelMap, SiteInfo
from llmcompress.model.units import UnitGroup, kept_fraction, removable_groups
from llmcompress.passes.base import PASSES, Backward, ModelPass, Trait
from llmcompress.passes.pruning.allocation import ALLOCATIONS, Request
from llmcompress.passes.pruning.gate_hooks import fold_gates
from llmcompress.passes.pruning.gate_kinds import KINDS, Task
from llmcompress.records.rows import SiteReport
from llmcompress.training.data.base import Windows
from llmcompress.training.job import Job
from llmcompress.training.loop import train
from llmcompress.training.objectives.cross_entropy import CrossEntropy
from llmcompress.training.objectives.penalty import Penalised, Penalty
from llmcompress.training.optimizer import ParameterGroup
from llmcompress.training.settings import Training

Kind = Literal["hard_concrete", "slimming", "group_lasso", "dsa", "decorator"]


@dataclass(frozen=True)
class Defaults:
    """Defaults of each kind, tuned on the bundled model. None: the kind has no such option."""

    strength: float | None = None
    gate_learning_rate: float | None = None


DEFAULTS: Mapping[Kind, Defaults] = MappingProxyType(
    {
        "hard_concrete": Defaults(strength=10.0, gate_learning_rate=0.05),
        "slimming": Defaults(strength=5.0, gate_learning_rate=0.02),
        "group_lasso": Defaults(strength=1.0),
        "dsa": Defaults(strength=10.0, gate_learning_rate=0.05),
        "decorator": Defaults(),
    }
)


@PASSES.register("gates")
class Gates(ModelPass):
    """Learn one multiplicative gate per head (key-value group) and FFN channel, and remove the units with the least
    important gates.

    Put `recover` after it: it trains the remaining, smaller model without gates.

    Source: Louizos et al., arXiv 1712.01312 and Shim et al., arXiv 2110.03252 (hard_concrete); Liu et al., arXiv
    1708.06519 (slimming); Wen et al., arXiv 1608.03665 (group_lasso); Ning et al., arXiv 2004.02164 (dsa); You et al.,
    arXiv 1909.08174 (decorator). Differs: exactly as many units are removed as the budget says, the least important
    first.
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"shapes"})
    conflicts: ClassVar[Mapping[Trait, str]] = {
        "pattern": "would shift the columns of N:M groups",
        "factors": "cannot remove rows and columns of low-rank factors",
    }

    kind: Kind = Field(
        "hard_concrete",
        description="hard_concrete: stochastic gates under a budget; slimming: L1 on gates; group_lasso: pulls a "
        "unit's weights to zero together; dsa: learns each layer's fraction; decorator: |gate · gradient|, in cycles",
    )
    fraction: float = Field(0.25, ge=0, lt=1, description="fraction of the channels, and of the heads, to remove")
    channels: bool = Field(True, description="prune FFN channels")
    heads: bool = Field(True, description="prune attention heads, whole key-value groups at a time")
    allocation: Literal["uniform", "global"] = Field(
        "uniform",
        description="uniform: the same number in every layer, so a plain config can represent the result; "
        "global: the same total, distributed by the gates",
    )
    floor: float = Field(0.25, ge=0, le=1, description="minimum fraction of units to keep in each layer")
    round_to: int = Field(1, ge=1, description="keep a multiple of this many channels")
    weights: bool | None = Field(
        None,
        description="train the model's weights with the gates (false: `recover` does it better afterwards); "
        "group_lasso and decorator always do",
    )
    gate_learning_rate: float | None = Field(
        None,
        gt=0,
        description="learning rate of the gates (0.02 or 0.05, by kind); `training` sets that of the weights",
    )
    strength: float | None = Field(None, gt=0, description="strength of the penalty")
    training: Training = Field(default_factory=Training, description="steps, learning rate and batches")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "dsa" and self.allocation == "uniform":
            raise ValueError("`kind: dsa` learns how many units each layer keeps: it needs `allocation: global`")
        defaults = DEFAULTS[self.kind]
        if defaults.strength is None and self.strength is not None:
            raise ValueError(f"`kind: {self.kind}` has no penalty: leave `strength` out")
        if defaults.gate_learning_rate is None and self.gate_learning_rate is not None:
            raise ValueError(f"`kind: {self.kind}` trains no gates: leave `gate_learning_rate` out")
        if defaults.gate_learning_rate is None and self.weights is False:
            raise ValueError(f"`kind: {self.kind}` trains the weights: leave `weights` out")
        return self

    @override
    def uses_data(self) -> bool:
        return True

    @override
    def check(self, model_map: ModelMap) -> None:
        if not self._groups(model_map):
            raise CompressError(
                "gates.nothing-to-remove",
                "the model has no units of the selected kinds that can be removed",
                fix="attention with a single key-value head has none, and none of its heads can go where the model "
                "counts them outside of its blocks; `llmcompress inspect` lists the units",
                exit_code=ExitCode.USAGE,
            )

    @override
    def kept_fraction(self, site: str, info: SiteInfo, model_map: ModelMap) -> float:
        """About the fraction, of what has gates."""
        block = next(block for block in model_map.blocks if site.startswith(f"{block.name}."))
        wanted = {"channels": self.channels, "heads": self.heads}
        return kept_fraction([g for g in removable_groups(block) if wanted[g.kind]], site, lambda _: self.fraction)

    @override
    def backward(self) -> Backward | None:
        training = self.training
        return Backward(of_all=3, windows=training.batch, trained_on=training.windows, lowered=training.lowered)

    @override
    def apply(self, whole: WholeModel) -> list[SiteReport]:
        groups = self._groups(whole.map)
        with whole.resident():
            keep = self._learn_and_fold(whole, groups)
        return self._shrink(whole, groups, keep)

    def _learn_and_fold(self, whole: WholeModel, groups: Sequence[UnitGroup]) -> list[Tensor]:
        """True for the units that stay; the columns of the others are zero afterwards."""
        learned = KINDS[self.kind](self._task(whole, groups))
        keep = self._kept(groups, learned.priorities, 1.0)
        gates = [gate_U * kept_U.to(gate_U) for gate_U, kept_U in zip(learned.gates, keep, strict=True)]
        fold_gates(whole.sites(), groups, gates)
        return keep

    def _task(self, whole: WholeModel, groups: Sequence[UnitGroup]) -> Task:
        model = whole.model
        no_gates = DEFAULTS[self.kind].gate_learning_rate is None
        weights: tuple[nn.Parameter, ...] = tuple(model.parameters()) if self.weights or no_gates else ()

        def train_gates(gates: Sequence[nn.Parameter], steps: int, penalty: Penalty | None, title: str = "") -> None:
            rate = self.gate_learning_rate or DEFAULTS[self.kind].gate_learning_rate
            fast = ParameterGroup(tuple(gates), learning_rate=rate, weight_decay=0.0)
            train(
                model,
                Windows(whole.context.windows_NT),
                self.training.model_copy(update={"steps": steps}),
                whole.context,
                objective=None if penalty is None else Penalised(CrossEntropy(), penalty),
                job=Job(f"gates ({self.kind}){title}", parameters=[*weights, *([fast] if gates else [])]),
            )

        def measure() -> None:
            model.requires_grad_(False)
            with torch.enable_grad():
                for ids_BT in whole.batches():
                    whole.context.progress.substep(f"gates ({self.kind}): gradients")
                    (whole.loss(ids_BT) * len(ids_BT)).backward()  # type: ignore[no-untyped-call]
            model.requires_grad_(True)

        return Task(
            model,
            groups,
            [self.fraction] * len(groups),
            self.allocation == "global",
            self.strength or DEFAULTS[self.kind].strength or 0.0,
            self.training.steps,
            lambda priorities, share: self._kept(groups, priorities, share),
            train_gates,
            measure,
        )

    def _kept(self, groups: Sequence[UnitGroup], priorities: Sequence[Tensor], share: float) -> list[Tensor]:
        requests = [
            Request(group, self.fraction * share, self.round_to if group.kind == "channels" else 1, self.floor)
            for group in groups
        ]
        return ALLOCATIONS[self.allocation](requests, priorities)

    def _groups(self, model_map: ModelMap) -> list[UnitGroup]:
        wanted = {"channels": self.channels, "heads": self.heads}
        return [group for info in model_map.blocks for group in removable_groups(info) if wanted[group.kind]]

    def _shrink(self, whole: WholeModel, groups: Sequence[UnitGroup], keep: Sequence[Tensor]) -> list[SiteReport]:
        rows: list[SiteReport] = []
        for work in whole.stream():
            mine = {
                group: kept_U
                for group, kept_U in zip(groups, keep, strict=True)
                if group.block.index == work.info.index and not bool(kept_U.all())
            }
            work.shrink({group.index: kept_U.nonzero().flatten().tolist() for group, kept_U in mine.items()})
            gone = {name: int((~kept_U).sum()) for group, kept_U in mine.items() for name in group.sites}
            for site in work.sites:
                if site.name in gone:
                    biases = 0 if site.bias_O is None else site.info.outputs
                    size = site.info.outputs * site.info.inputs + biases
                    rows.append(SiteReport(site=site.name, algorithm="gates", removed=gone[site.name], parameters=size))
        return rows
