"""Rough foresight: how much memory and time compressing a model takes. N = calibration tokens, O, I = a site's sizes.

Memory: the model in float32 (offloaded: its largest part), the hidden states of all calibration tokens before and after
a block, one batch inside a block, and the largest pass's statistics with the copies made while solving; where gradients
go through the whole model, all that one batch computes and what the pass keeps. Time: multiplications ÷ the speed of a
matrix product measured now. Time is meant to be right within a factor of two, memory within a fifth, and both to order
alternatives correctly.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal

import psutil
import torch

from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.map import BlockInfo, InputGroup, ModelMap
from llmcompress.numerics.loss import LOGITS_BYTES, LOGITS_COPIES, windows_at_once
from llmcompress.numerics.statistics import Gram
from llmcompress.passes.base import PASSES, BlockPass, Pass
from llmcompress.recipe.model import Recipe

Offload = Literal["auto", "always", "never"]
"""Whether weights stay on disk while nobody computes with them; auto: when they would not fit into memory."""

_FLOAT = 4
_SHARE_OF_MEMORY = 0.7
"""Of the free memory that weights may take; passes need the rest."""
_SOLVING_COPIES = 2
"""Of a Gram matrix, in float32: permuted and factored; it is inverted in its place."""
_WEIGHT_COPIES = 4
"""Of a site's weights while it is solved: as they are, permuted, transposed for the sweep, codes and masks."""
_SAVED_HIDDEN = 10
"""Hidden states that a block keeps per token for the gradient, beside its linears' outputs: norms, turned queries and
keys, sums."""
_SAVED_OUTPUTS = 2
"""The outputs of linears themselves, and what is computed from them."""
_BACKWARD_FORWARDS = 3
"""Forward passes that one forward and its gradients cost."""
_SOLVING_PRODUCTS = 40
"""Products ΔW·G of O×I by I×I that solving one site takes in time: AWQ tries about twenty scales and twenty ranges."""


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
            f"{processes} processes share one run, and weights on disk serve one process only",
            fix="run it in one process, or use --offload never",
            exit_code=ExitCode.USAGE,
        )
    if offload == "always" and blocked:
        raise CompressError(
            "memory.needed",
            "some passes need the whole model in memory",
            where=", ".join(blocked),
            fix="use --offload never, or leave these passes out",
            exit_code=ExitCode.USAGE,
        )
    too_large = 2 * weight_bytes > _SHARE_OF_MEMORY * psutil.virtual_memory().available
    return offload == "always" or (too_large and not blocked and processes == 1)


def peak_memory_bytes(
    recipe: Recipe, model_map: ModelMap, *, parameters: int, vocabulary: int, offloaded: bool = False
) -> int:
    """Most bytes resident at any time, the interpreter and its libraries included; `vocabulary` = embedding rows."""
    tokens = recipe.calibration.samples * recipe.calibration.tokens
    needs_data = any(each.uses_data() for each in recipe.passes)
    streams = 2 if any(each.wants_dense() for each in _block_passes(recipe)) else 1
    hidden = 2 * streams * _FLOAT * tokens * model_map.hidden_size if needs_data else 0
    batch = recipe.calibration.batch * recipe.calibration.tokens if needs_data else 0
    working = max(
        (_working_bytes(each, block, batch) for each in _block_passes(recipe) for block in model_map.blocks), default=0
    )
    evaluating = LOGITS_BYTES if recipe.evaluate else 0
    libraries = psutil.Process().memory_info().rss
    if not offloaded:
        gradients = max(
            (_gradient_bytes(each, recipe, model_map, parameters, vocabulary) for each in recipe.passes), default=0
        )
        return libraries + _FLOAT * parameters + max(hidden + working, gradients, evaluating)
    blocks = (sum(site.outputs * site.inputs for site in block.structure.sites) for block in model_map.blocks)
    table = _FLOAT * vocabulary * model_map.hidden_size
    return libraries + max(hidden + working + _FLOAT * max(blocks, default=0), hidden + table, table + evaluating)


def seconds(recipe: Recipe, model_map: ModelMap) -> float:
    """Of passes over all blocks and of gradients, on the device that `auto` would choose; the head is left out."""
    tokens = recipe.calibration.samples * recipe.calibration.tokens
    window = recipe.calibration.tokens
    through_model = _forwards_of_gradients(recipe)
    flops = 0.0
    for block in model_map.blocks:
        measuring = [each for each in _block_passes(recipe) if each.forwards() and any(_groups(each, block))]
        weights = sum(site.outputs * site.inputs for site in block.structure.sites)
        forward = 2.0 * tokens * weights + 4.0 * tokens * window * model_map.hidden_size
        flops += forward * (sum(each.forwards() for each in measuring) + 1 + through_model)
        flops += sum(_statistics_flops(each, block, tokens) for each in measuring)
    return flops / matmul_flops_per_second()


def _forwards_of_gradients(recipe: Recipe) -> float:
    """What gradients through the whole model cost, in forward passes over all calibration windows."""
    samples = recipe.calibration.samples
    found = [gradients for each in recipe.passes if (gradients := each.backward())]
    return sum(_BACKWARD_FORWARDS * (each.trained_on or samples) / samples for each in found)


def matmul_flops_per_second(size: int = 512, seconds: float = 0.05) -> float:
    """Speed of float32 matrix products here and now."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrix = torch.ones(size, size, device=device)
    float((matrix @ matrix)[0, 0])  # the first product also starts threads and libraries
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        float((matrix @ matrix)[0, 0])
        done += 1
    return done * 2.0 * size**3 / (time.perf_counter() - started)


def _working_bytes(each: BlockPass, block: BlockInfo, tokens: int) -> int:
    """Beside weights and hidden states: one batch inside the block; then its statistics and what solving a site takes.

    Gram matrices of all input groups are there at once; vectors do not count.
    """
    sites = block.structure.sites
    inside = _FLOAT * tokens * sum(site.outputs for site in sites)
    if Gram not in each.measures():
        return inside
    squares = [_inputs(block, group) ** 2 for group in _groups(each, block)]
    weights = max((site.outputs * site.inputs for site in sites), default=0)
    solving = _SOLVING_COPIES * max(squares, default=0) + _WEIGHT_COPIES * weights
    return _FLOAT * sum(squares) + max(inside, _FLOAT * solving)


def _gradient_bytes(each: Pass, recipe: Recipe, model_map: ModelMap, parameters: int, vocabulary: int) -> int:
    """Beside the weights, while gradients of the loss go through the whole model; 0 for a pass that takes none."""
    found = each.backward()
    if not found:
        return 0
    most = windows_at_once(recipe.calibration.tokens, vocabulary)
    tokens = min(found.windows or recipe.calibration.batch, most) * recipe.calibration.tokens
    selects = each.selects if isinstance(each, BlockPass) else lambda _: True
    weights = saved = 0
    for block in model_map.blocks:
        sites = block.structure.sites
        weights += sum(site.outputs * site.inputs for site in sites if selects(block.full(site.name)))
        saved += _SAVED_OUTPUTS * sum(site.outputs for site in sites) + _SAVED_HIDDEN * model_map.hidden_size
    kept = found.copies * weights + found.of_all * parameters
    return int(_FLOAT * (kept + tokens * (LOGITS_COPIES * vocabulary + saved)))


def _statistics_flops(each: BlockPass, block: BlockInfo, tokens: int) -> float:
    if Gram not in each.measures():
        return 0.0
    measuring = sum(2.0 * tokens * _inputs(block, group) ** 2 for group in _groups(each, block))
    sites = [site for site in block.structure.sites if each.selects(block.full(site.name))]
    return measuring + sum(2.0 * _SOLVING_PRODUCTS * site.outputs * site.inputs**2 for site in sites)


def _block_passes(recipe: Recipe) -> list[BlockPass]:
    return [each for each in recipe.passes if isinstance(each, BlockPass)]


def _groups(each: BlockPass, block: BlockInfo) -> Iterator[InputGroup]:
    """Input groups with at least one selected site."""
    for group in block.structure.groups:
        if any(each.selects(block.full(name)) for name in group.sites):
            yield group


def _inputs(block: BlockInfo, group: InputGroup) -> int:
    return block.structure.site(group.sites[0]).inputs
