"""The resource estimate of a recipe: operations here, memory in `peak_memory.py`; the speed of a machine.

Time: operations ÷ the speed of a matrix product on this machine, right within a factor of two, and in the order of
alternatives; `trial_run.py` measures what an operation of this recipe takes on a few blocks (docs/results.md).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import psutil
import torch

from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.map import BlockInfo, ModelMap
from llmcompress.passes.base import PASSES, BlockPass, Pass
from llmcompress.peak_memory import BACKWARD_FORWARDS, Measuring, ModelSize, groups_of, inputs_of, peak_bytes
from llmcompress.recipe.model import Recipe

Offload = Literal["auto", "always", "never"]
"""Whether weights are offloaded to disk; auto: if they would not fit into memory."""

_SHARE_OF_MEMORY = 0.7
"""Fraction of the free memory for weights; passes need the rest."""
_EVALUATED_MODELS = 2
"""The dense one, unless its scores are known already, and the compressed one."""
_SOLVING_PRODUCTS = 40
"""Products ΔW·G of O×I by I×I that solving one site takes in time: AWQ tries about twenty scales and twenty ranges."""
_ROUNDED_WEIGHT = 1000.0
"""Operations of a matrix product in whose time one weight gets its range and its code."""


@dataclass(frozen=True)
class Cost:
    """The resources of a recipe, on any machine."""

    operations: float
    """Multiplications and additions of passes over all blocks and of gradients, without the output head."""
    head_operations: float
    """Those of the output head: gradients and searches by perplexity compute logits of the calibration windows."""
    forwards: float
    """How often all calibration windows pass through all blocks; a forward and backward pass counts as three."""
    peak_bytes: int
    """Peak bytes, without the interpreter and its libraries."""
    evaluation_operations: float | None = None
    """Of evaluating the dense and the compressed model; None: the length of a text is not known before it is read."""
    lowered_operations: float = 0.0
    """Those in bfloat16 or float16, of calibration and of trainings with the output head; the others leave them out."""
    lowered_where_faster: bool = False
    """Whether `calibration.mixed_precision` is auto: devices that are not faster in bfloat16 do them in float32."""


class Machine(NamedTuple):
    """The speed and base memory of a machine, to turn a cost into seconds and process memory."""

    operations_per_second: float
    """In float32."""
    process_bytes: int = 0
    """Of the interpreter and its libraries."""
    lowered_per_second: float | None = None
    """In bfloat16; None: as many."""

    def seconds(self, taken: Cost) -> float:
        """Of all but evaluation."""
        lowered = self.lowered_per_second or self.operations_per_second
        if taken.lowered_where_faster:
            lowered = max(lowered, self.operations_per_second)
        plain = taken.operations + taken.head_operations
        return plain / self.operations_per_second + taken.lowered_operations / lowered


def must_offload(offload: Offload, passes: Sequence[Pass], *, weight_bytes: int, processes: int = 1) -> bool:
    """Whether a run keeps the weights on disk; `weight_bytes` is what they take there, in 16 bits each.

    Raises: CompressError for `always` with a pass that needs the whole model in memory, or with several processes.
    """
    if offload == "never":
        return False
    blocked = [PASSES.name_of(type(each)) for each in passes if not each.streams()]
    if offload == "always" and processes > 1:
        raise CompressError(
            "memory.processes",
            f"disk offload supports a single process, and {processes} were started",
            fix="start without torchrun, or set offload to never",
            exit_code=ExitCode.USAGE,
        )
    if offload == "always" and blocked:
        raise CompressError(
            "memory.needed",
            "some passes need the whole model in memory, which disk offload does not give them",
            where=", ".join(blocked),
            fix="set offload to never, or remove these passes",
            exit_code=ExitCode.USAGE,
        )
    too_large = 2 * weight_bytes > _SHARE_OF_MEMORY * psutil.virtual_memory().available
    return offload == "always" or (too_large and not blocked and processes == 1)


def cost(recipe: Recipe, model_map: ModelMap, size: ModelSize, *, offloaded: bool = False) -> Cost:
    """The cost of a recipe, from the map and the recipe only: nothing is computed, measured or read."""
    samples = recipe.calibration.samples
    passes = [Measuring.of(each, samples) for each in recipe.passes if isinstance(each, BlockPass)]
    once = int(any(each.uses_data() for each in recipe.passes))  # without windows nothing goes through the blocks
    blocks = model_map.blocks
    forwards = [once + sum(each.forwards for each in passes if any(groups_of(each, block))) for block in blocks]
    through_model = with_logits = lowered = 0.0
    for each in recipe.passes:
        plain, logits = each.forwards_through_model(len(model_map.blocks))
        gradients = each.backward()
        times = (gradients.trained_on or samples) / samples if gradients else 0.0
        recomputed = gradients.recomputes if gradients else 0
        taught = len(each.teachers()) * times
        if gradients and gradients.lowered:
            lowered += BACKWARD_FORWARDS * times + taught
            times = taught = 0.0
        through_model += plain + (BACKWARD_FORWARDS + recomputed) * times + taught
        with_logits += logits + BACKWARD_FORWARDS * times + taught
    mixed = recipe.calibration.mixed_precision is not None
    in_float32 = [through_model + (0 if mixed else times) for times in forwards]
    in_bfloat16 = [lowered + (times if mixed else 0) for times in forwards]
    head = 2.0 * samples * recipe.calibration.tokens * size.vocabulary * model_map.hidden_size
    return Cost(
        operations=_operations(recipe, model_map, passes, in_float32),
        head_operations=head * with_logits,
        lowered_operations=lowered * head + _forward_operations(recipe, model_map, in_bfloat16),
        lowered_where_faster=recipe.calibration.mixed_precision == "auto",
        forwards=sum(forwards) / max(len(forwards), 1) + through_model + lowered,
        peak_bytes=peak_bytes(recipe, model_map, passes, size, offloaded=offloaded),
        evaluation_operations=_evaluation(recipe, model_map, size),
    )


def about(seconds: float) -> str:
    """As exact as the estimate is: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def this_machine(device: torch.device, *, size: int = 512, seconds: float = 0.05) -> Machine:
    """Speed of matrix products on `device` here and now, and what this process takes already."""

    def speed(dtype: torch.dtype) -> float:
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        float((matrix @ matrix)[0, 0])  # the first product also starts threads and libraries
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            float((matrix @ matrix)[0, 0])
            done += 1
        return done * 2.0 * size**3 / (time.perf_counter() - started)

    return Machine(speed(torch.float32), psutil.Process().memory_info().rss, speed(torch.bfloat16))


def _forward_operations(recipe: Recipe, model_map: ModelMap, forwards: Sequence[float]) -> float:
    """Of all calibration windows through every block so many times."""
    window = recipe.calibration.tokens
    tokens, total = recipe.calibration.samples * window, 0.0
    for block, times in zip(model_map.blocks, forwards, strict=True):
        weights = sum(site.outputs * site.inputs for site in block.structure.sites)
        total += times * (2.0 * tokens * weights + 4.0 * tokens * window * model_map.hidden_size)
    return total


def _operations(recipe: Recipe, model_map: ModelMap, passes: Sequence[Measuring], forwards: Sequence[float]) -> float:
    """Operations of passes over all blocks and of gradients, without the output head."""
    tokens = recipe.calibration.samples * recipe.calibration.tokens
    total = _forward_operations(recipe, model_map, forwards)
    for block in model_map.blocks:
        total += sum(_statistics_operations(each, block, tokens) for each in passes if each.forwards)
        total += sum(_ROUNDED_WEIGHT * _selected_weights(each, block) for each in passes if each.rounds)
    return total


def _evaluation(recipe: Recipe, model_map: ModelMap, size: ModelSize) -> float | None:
    """The head counts here: it computes logits of every token."""
    weights = size.vocabulary * model_map.hidden_size + sum(
        site.outputs * site.inputs for block in model_map.blocks for site in block.structure.sites
    )
    total = 0.0
    for window, tokens in (
        each for settings in recipe.evaluate for each in settings.evaluated_tokens(size.max_positions)
    ):
        if tokens is None:
            return None
        attention = 4.0 * window * model_map.hidden_size * len(model_map.blocks)
        total += _EVALUATED_MODELS * tokens * (2.0 * weights + attention)
    return total


def _selected_weights(each: Measuring, block: BlockInfo) -> int:
    sites = block.structure.sites
    return sum(site.outputs * site.inputs for site in sites if each.selects(block.full(site.name)))


def _statistics_operations(each: Measuring, block: BlockInfo, tokens: int) -> float:
    if not each.solves:
        return 0.0
    measuring = sum(2.0 * tokens * inputs_of(block, group) ** 2 for group in groups_of(each, block))
    sites = [site for site in block.structure.sites if each.selects(block.full(site.name))]
    return measuring + sum(2.0 * _SOLVING_PRODUCTS * site.outputs * site.inputs**2 for site in sites)
