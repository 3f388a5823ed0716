"""Histograms of weights and input activations, of the same linear in all blocks, taken during one forward pass.

B = bins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.evaluation.metrics.base import METRICS, Metric, Observation, Subject
from llmcompress.evaluation.settings.distributions import Distributions
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.evaluation.texts import evaluation_text
from llmcompress.modules.base import CompressedModule
from llmcompress.modules.expression import Opaque
from llmcompress.progress import Progress
from llmcompress.records.inside import Distribution
from llmcompress.records.measurements import Measurement, Which
from llmcompress.runners.base import Runner

BINS = 64

REACH = 4.0
"""Standard deviations of the first block's values that the bins cover on each side."""

What = Literal["weights", "activations"]


@dataclass
class _Histogram:
    """Accumulates values in bins."""

    reach: float
    counts_B: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.long))
    outside: int = 0
    zeros: int = 0
    values: int = 0
    largest: float = 0.0

    def add(self, values: Tensor) -> None:
        flat = values.detach().flatten().float()
        counts_B = torch.histc(flat, BINS, -self.reach, self.reach).long().cpu()
        self.counts_B += counts_B
        self.outside += len(flat) - int(counts_B.sum())
        self.zeros += int((flat == 0).sum())
        self.values += len(flat)
        self.largest = max(self.largest, float(flat.abs().max()))


@METRICS.register("distributions")
@dataclass(frozen=True)
class DistributionMetric(Metric):
    """One window; observed are the histograms by kind of linear."""

    window_W: Tensor

    @classmethod
    @override
    def prepare(cls, settings: Sequence[Distributions], subject: Subject) -> list[DistributionMetric]:
        tokens = settings[-1].tokens
        window = min(tokens, subject.max_positions or tokens)
        task = PerplexityTask(source="builtin:evaluation", window=window, max_windows=1)
        return [cls(evaluation_text(task, subject.tokenizer, subject.max_positions).windows[0])]

    @property
    @override
    def name(self) -> str:
        return "distributions"

    @property
    @override
    def fingerprint(self) -> str:
        settings = f"distributions {BINS} {REACH} {self.window_W.tolist()}"
        return hashlib.sha256(settings.encode()).hexdigest()

    @override
    def observe(self, runner: Runner, progress: Progress, *, dense: Observation | None) -> Observation:
        """The bins are those of the dense model where there is one; a runtime without modules shows nothing."""
        model = runner.torch_module()
        if model is None:
            return Observation(facts={"found": {}})
        progress.stage(self.name, 1)
        known = {} if dense is None else dense.facts["found"]
        found: dict[str, _Histogram] = {}
        with ExitStack() as undo:
            for name, module in _linears(model):
                sites = ".".join("*" if part.isdecimal() else part for part in name.split("."))
                undo.callback(module.register_forward_pre_hook(partial(_look, found, known, sites)).remove)
            runner.logits(self.window_W[None])
        progress.step(f"{len(found)} histograms")
        return Observation(facts={"found": {key: _facts(each) for key, each in found.items()}})

    @override
    def results(self, found: Observation, of: Which) -> list[Measurement]:
        return [
            Distribution(of=of, what=cast(What, key.split()[0]), sites=key.split()[1], **facts)
            for key, facts in found.facts["found"].items()
        ]

    @override
    def compared(self, dense: Observation, found: Observation) -> list[Measurement]:
        """Nothing: the report shows both."""
        return []


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear of a block, plain or compressed; what stands inside another one is not told apart."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        in_block = any(part.isdecimal() for part in name.split("."))
        if not in_block or name.startswith(inside):
            continue
        if isinstance(module, nn.Linear) or _stands_for_a_matrix(module):
            inside = (*inside, f"{name}.")
            yield name, module


def _stands_for_a_matrix(module: nn.Module) -> bool:
    """Asked of what it computes: multiplying it out would take its weights from the disk where they are offloaded."""
    return isinstance(module, CompressedModule) and not any(
        isinstance(node, Opaque) for node in module.expression().nodes()
    )


def _weight(module: nn.Module) -> Tensor | None:
    """The matrix that a linear stands for; None where a loader keeps it in a form of its own."""
    if isinstance(module, CompressedModule):
        return module.dense_weight()
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _look(
    found: dict[str, _Histogram], known: Mapping[str, Any], sites: str, module: nn.Module, args: tuple[Any, ...]
) -> None:
    """Weights are looked at when they are used: before, they may be on disk."""
    weight = _weight(module)
    inputs = args[0] if args and isinstance(args[0], Tensor) else None
    for what, values in (("weights", weight), ("activations", inputs)):
        if values is None or not values.is_floating_point() or values.numel() < 2:
            continue
        key = f"{what} {sites}"
        if key not in found:
            reach = known[key]["high"] if key in known else REACH * float(values.detach().float().std())
            found[key] = _Histogram(reach or 1.0)
        found[key].add(values)


def _facts(found: _Histogram) -> dict[str, Any]:
    return {
        "low": -found.reach,
        "high": found.reach,
        "counts": found.counts_B.tolist(),
        "outside": found.outside,
        "zeros": found.zeros / found.values,
        "largest": found.largest,
    }
