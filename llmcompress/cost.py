"""The resource estimate: memory and operations of a recipe. N = calibration tokens; O, I = a site's sizes.

Memory: the model in float32 (offloaded: its largest part), the hidden states of all calibration tokens before and after
a block, one batch inside a block, and the largest pass's statistics with the copies made while solving; where gradients
go through the whole model, all activations of one batch and what the pass keeps. Time: operations ÷ the speed of a
matrix product on this machine. Time should be right within a factor of two, memory within a fifth, and both should
order alternatives correctly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import psutil
import torch

from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.map import BlockInfo, InputGroup, ModelMap
from llmcompress.numerics.loss import LOGITS_BYTES, LOGITS_COPIES, windows_at_once
from llmcompress.numerics.statistics import Gram
from llmcompress.passes.base import PASSES, BlockPass, Pass
from llmcompress.recipe.model import Recipe
from llmcompress.sensitivity.gradients import rows_at_once

Offload = Literal["auto", "always", "never"]
"""Whether weights are offloaded to disk; auto: if they would not fit into memory."""

_FLOAT = 4
_SHARE_OF_MEMORY = 0.7
"""Fraction of the free memory for weights; passes need the rest."""
_SOLVING_COPIES = 2
"""Of a Gram matrix, in float32: permuted and factored; it is inverted in its place."""
_WEIGHT_COPIES = 4
"""Of a site's weights while it is solved: as they are, permuted, transposed for the sweep, codes and masks."""
_SAVED_HIDDEN = 10
"""Hidden states that a block keeps per token for the gradient, besides its linears' outputs: norms, turned queries and
keys, sums."""
_SAVED_OUTPUTS = 2
"""The outputs of linears themselves, and what is computed from them."""
_BACKWARD_FORWARDS = 3
"""Forward passes that one forward and its gradients cost; one more where blocks are computed again."""
_LEARNING_COPIES = 12
"""Of a block's weights while its codes are learned: latent ones with gradient, two moments and the best so far, first
codes, what codes are relaxed to, the weights these give, and their graph."""
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
    forwards: float
    """How often all calibration windows pass through all blocks; a forward and backward pass counts as three."""
    peak_bytes: int
    """Peak bytes, without the interpreter and its libraries."""
    evaluation_operations: float | None = None
    """Of evaluating the dense and the compressed model; None: the length of a text is not known before it is read."""


@dataclass(frozen=True)
class _Measuring:
    """What a pass measures, asked once and not for every block."""

    selects: Callable[[str], bool]
    forwards: float
    wants_dense: bool
    solves: bool
    """Whether Gram matrices are measured, and systems solved with them."""
    rounds: bool
    """Whether it ends in codes."""
    learns: bool
    """Whether gradients go through single blocks."""

    @classmethod
    def of(cls, each: BlockPass, samples: int) -> _Measuring:
        learning = _BACKWARD_FORWARDS * each.trained_windows() / samples
        solves, forwards = Gram in each.measures(), each.forwards() + learning
        return cls(each.selects, forwards, each.wants_dense(), solves, each.quantizes(), learns=learning > 0)


class Machine(NamedTuple):
    """The speed and base memory of a machine, to turn a cost into seconds and process memory."""

    operations_per_second: float
    process_bytes: int = 0
    """Of the interpreter and its libraries."""


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


def cost(
    recipe: Recipe,
    model_map: ModelMap,
    *,
    parameters: int,
    vocabulary: int,
    max_positions: int | None = None,
    offloaded: bool = False,
) -> Cost:
    """The cost of a recipe, from the map and the recipe only: nothing is computed, measured or read.

    `vocabulary` = embedding rows.
    """
    samples = recipe.calibration.samples
    passes = [_Measuring.of(each, samples) for each in recipe.passes if isinstance(each, BlockPass)]
    once = int(any(each.uses_data() for each in recipe.passes))  # without windows nothing goes through the blocks
    forwards = [once + sum(each.forwards for each in passes if any(_groups(each, block))) for block in model_map.blocks]
    through_model = sum(
        (_BACKWARD_FORWARDS + gradients.recomputes) * (gradients.trained_on or samples) / samples
        for each in recipe.passes
        if (gradients := each.backward())
    ) + sum(each.forwards_through_model(len(model_map.blocks)) for each in recipe.passes)
    return Cost(
        operations=_operations(recipe, model_map, passes, [times + through_model for times in forwards]),
        forwards=sum(forwards) / max(len(forwards), 1) + through_model,
        peak_bytes=_peak_bytes(recipe, model_map, passes, parameters, vocabulary, offloaded=offloaded),
        evaluation_operations=_evaluation(recipe, model_map, vocabulary, max_positions),
    )


def about(seconds: float) -> str:
    """As exact as the estimate is: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def this_machine(device: torch.device, *, size: int = 512, seconds: float = 0.05) -> Machine:
    """Speed of float32 matrix products on `device` here and now, and what this process takes already."""
    matrix = torch.ones(size, size, device=device)
    float((matrix @ matrix)[0, 0])  # the first product also starts threads and libraries
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        float((matrix @ matrix)[0, 0])
        done += 1
    speed = done * 2.0 * size**3 / (time.perf_counter() - started)
    return Machine(speed, psutil.Process().memory_info().rss)


def _peak_bytes(
    recipe: Recipe,
    model_map: ModelMap,
    passes: Sequence[_Measuring],
    parameters: int,
    vocabulary: int,
    *,
    offloaded: bool,
) -> int:
    tokens = recipe.calibration.samples * recipe.calibration.tokens
    needs_data = any(each.uses_data() for each in recipe.passes)
    streams = 2 if any(each.wants_dense for each in passes) else 1
    hidden = 2 * streams * _FLOAT * tokens * model_map.hidden_size if needs_data else 0
    batch = recipe.calibration.batch * recipe.calibration.tokens if needs_data else 0
    working = max((_working_bytes(each, block, batch) for each in passes for block in model_map.blocks), default=0)
    working += _baseline_bytes(recipe, model_map) if needs_data else 0
    evaluating = LOGITS_BYTES if recipe.evaluate else 0
    if not offloaded:
        gradients = max(
            (_gradient_bytes(each, recipe, model_map, parameters, vocabulary) for each in recipe.passes), default=0
        )
        return _FLOAT * parameters + max(hidden + working, gradients, evaluating)
    blocks = (sum(site.outputs * site.inputs for site in block.structure.sites) for block in model_map.blocks)
    table = _FLOAT * vocabulary * model_map.hidden_size
    return max(hidden + working + _FLOAT * max(blocks, default=0), hidden + table, table + evaluating)


def _operations(recipe: Recipe, model_map: ModelMap, passes: Sequence[_Measuring], forwards: Sequence[float]) -> float:
    """Operations of passes over all blocks and of gradients, without the output head."""
    window = recipe.calibration.tokens
    tokens = recipe.calibration.samples * window
    total = 0.0
    for block, times in zip(model_map.blocks, forwards, strict=True):
        weights = sum(site.outputs * site.inputs for site in block.structure.sites)
        once = 2.0 * tokens * weights + 4.0 * tokens * window * model_map.hidden_size
        total += once * times
        total += sum(_statistics_operations(each, block, tokens) for each in passes if each.forwards)
        total += sum(_ROUNDED_WEIGHT * _selected_weights(each, block) for each in passes if each.rounds)
    return total


def _evaluation(recipe: Recipe, model_map: ModelMap, vocabulary: int, max_positions: int | None) -> float | None:
    """The head counts here: it computes logits of every token."""
    weights = vocabulary * model_map.hidden_size + sum(
        site.outputs * site.inputs for block in model_map.blocks for site in block.structure.sites
    )
    total = 0.0
    for window, tokens in (each for settings in recipe.evaluate for each in settings.evaluated_tokens(max_positions)):
        if tokens is None:
            return None
        attention = 4.0 * window * model_map.hidden_size * len(model_map.blocks)
        total += _EVALUATED_MODELS * tokens * (2.0 * weights + attention)
    return total


def _working_bytes(each: _Measuring, block: BlockInfo, tokens: int) -> int:
    """Besides weights and hidden states: one batch inside the block; then its statistics and what solving a site takes.

    Gram matrices of all input groups are there at once; vectors do not count.
    """
    sites = block.structure.sites
    inside = _FLOAT * tokens * sum(site.outputs for site in sites)
    if each.learns:
        inside += _LEARNING_COPIES * _FLOAT * sum(site.outputs * site.inputs for site in sites)
    if not each.solves:
        return inside
    squares = [_inputs(block, group) ** 2 for group in _groups(each, block)]
    weights = max((site.outputs * site.inputs for site in sites), default=0)
    solving = _SOLVING_COPIES * max(squares, default=0) + _WEIGHT_COPIES * weights
    return _FLOAT * sum(squares) + max(inside, _FLOAT * solving)


def _baseline_bytes(recipe: Recipe, model_map: ModelMap) -> int:
    """A second block, which the guard compares the first one with."""
    blocks = (sum(site.outputs * site.inputs for site in block.structure.sites) for block in model_map.blocks)
    return _FLOAT * max(blocks, default=0) if recipe.guard.windows and recipe.guard.fall_back else 0


def _gradient_bytes(each: Pass, recipe: Recipe, model_map: ModelMap, parameters: int, vocabulary: int) -> int:
    """Besides the weights, while gradients of the loss are computed; 0 for a pass without gradients."""
    found = each.backward()
    if not found:
        return 0
    most = windows_at_once(recipe.calibration.tokens, vocabulary)
    windows = found.windows or recipe.calibration.batch
    with_logits = min(windows, most) * recipe.calibration.tokens
    # a training computes logits in parts, but a batch goes through the blocks as a whole
    tokens = windows * recipe.calibration.tokens if found.trained_on else with_logits
    selects = each.selects if isinstance(each, BlockPass) else lambda _: True
    weights, saved = 0, list[int]()
    for block in model_map.blocks:
        sites = block.structure.sites
        weights += sum(site.outputs * site.inputs for site in sites if selects(block.full(site.name)))
        saved.append(_SAVED_OUTPUTS * sum(site.outputs for site in sites) + _SAVED_HIDDEN * model_map.hidden_size)
    kept = found.copies * weights + found.of_all * parameters
    if found.recomputes:
        with_logits = min(with_logits, rows_at_once(vocabulary))
        of_token = max(saved, default=0) + len(saved) * model_map.hidden_size
    else:
        of_token = sum(saved)
    return int(_FLOAT * (kept + with_logits * LOGITS_COPIES * vocabulary + tokens * of_token))


def _selected_weights(each: _Measuring, block: BlockInfo) -> int:
    sites = block.structure.sites
    return sum(site.outputs * site.inputs for site in sites if each.selects(block.full(site.name)))


def _statistics_operations(each: _Measuring, block: BlockInfo, tokens: int) -> float:
    if not each.solves:
        return 0.0
    measuring = sum(2.0 * tokens * _inputs(block, group) ** 2 for group in _groups(each, block))
    sites = [site for site in block.structure.sites if each.selects(block.full(site.name))]
    return measuring + sum(2.0 * _SOLVING_PRODUCTS * site.outputs * site.inputs**2 for site in sites)


def _groups(each: _Measuring, block: BlockInfo) -> Iterator[InputGroup]:
    """Input groups with at least one selected site."""
    for group in block.structure.groups:
        if any(each.selects(block.full(name)) for name in group.sites):
            yield group


def _inputs(block: BlockInfo, group: InputGroup) -> int:
    return block.structure.site(group.sites[0]).inputs
