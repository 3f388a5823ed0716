"""The most memory that a recipe takes, by when it takes it. N = calibration tokens; O, I = a site's sizes.

The model in float32 (offloaded: its largest part), and the largest of: its files while they are read; the hidden states
of all calibration tokens before and after a block, one batch inside a block, and the largest pass's statistics with the
copies made while solving; where gradients go through the whole model, what one batch and the pass keep; the logits of
an evaluated batch. What is freed counts no more (`calibration/offloading.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llmcompress.model.map import BlockInfo, InputGroup, ModelMap
from llmcompress.numerics.loss import LOGITS_COPIES, windows_at_once
from llmcompress.numerics.statistics import Gram
from llmcompress.passes.base import BlockPass, Pass
from llmcompress.recipe.model import Recipe
from llmcompress.sensitivity.gradients import rows_at_once

BACKWARD_FORWARDS = 3
"""Forward passes that one forward and its gradients cost; one more where blocks are computed again."""

_FLOAT = 4
_SOLVING_COPIES = 2
"""Of a Gram matrix, in float32: permuted and factored; it is inverted in its place."""
_WEIGHT_COPIES = 4
"""Of a site's weights while it is solved: as they are, permuted, transposed for the sweep, codes and masks."""
_SAVED_HIDDEN = 10
"""Hidden states that a block keeps per token for the gradient, besides its linears' outputs: norms, turned queries and
keys, sums."""
_SAVED_OUTPUTS = 2
"""The outputs of linears themselves, and what is computed from them."""
_LEARNING_COPIES = 12
"""Of a block's weights while its codes are learned: latent ones with gradient, two moments and the best so far, first
codes, what codes are relaxed to, the weights these give, and their graph."""


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a model that its map does not hold."""

    parameters: int
    vocabulary: int
    """Rows of the embedding."""
    max_positions: int | None = None
    converted_bytes: int = 0
    """Of the files that are mapped while the model is read into float32, in other dtypes; 0: it is in memory."""


@dataclass(frozen=True)
class Measuring:
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
    def of(cls, each: BlockPass, samples: int) -> Measuring:
        """Of a pass, with so many calibration windows."""
        learning = BACKWARD_FORWARDS * each.trained_windows() / samples
        solves, forwards = Gram in each.measures(), each.forwards() + learning
        return cls(each.selects, forwards, each.wants_dense(), solves, each.quantizes(), learns=learning > 0)


def peak_bytes(
    recipe: Recipe, model_map: ModelMap, passes: Sequence[Measuring], size: ModelSize, *, offloaded: bool
) -> int:
    """Peak bytes, without the interpreter and its libraries."""
    needs_data = any(each.uses_data() for each in recipe.passes)
    working = _compressing_bytes(recipe, model_map, passes) if needs_data else _largest_site(model_map)
    evaluating = max((_evaluating_bytes(model_map, size, *each) for each in _evaluated(recipe, size)), default=0)
    if not offloaded:
        gradients = max((_gradient_bytes(each, recipe, model_map, size) for each in recipe.passes), default=0)
        return _FLOAT * size.parameters + max(working, gradients, evaluating, size.converted_bytes)
    blocks = (sum(site.outputs * site.inputs for site in block.structure.sites) for block in model_map.blocks)
    table = _FLOAT * size.vocabulary * model_map.hidden_size
    hidden = _hidden_bytes(recipe, model_map, passes) if needs_data else 0
    return max(working + _FLOAT * max(blocks, default=0), hidden + table, table + evaluating)


def _compressing_bytes(recipe: Recipe, model_map: ModelMap, passes: Sequence[Measuring]) -> int:
    batch = recipe.calibration.batch * recipe.calibration.tokens
    working = max((_working_bytes(each, block, batch) for each in passes for block in model_map.blocks), default=0)
    return _hidden_bytes(recipe, model_map, passes) + working + _baseline_bytes(recipe, model_map)


def _hidden_bytes(recipe: Recipe, model_map: ModelMap, passes: Sequence[Measuring]) -> int:
    """Hidden states of all calibration tokens before and after a block."""
    streams = 2 if any(each.wants_dense for each in passes) else 1
    return 2 * streams * _FLOAT * recipe.calibration.samples * recipe.calibration.tokens * model_map.hidden_size


def _largest_site(model_map: ModelMap) -> int:
    """Copies of one weight while it is rounded or masked without data."""
    sites = (site.outputs * site.inputs for block in model_map.blocks for site in block.structure.sites)
    return _WEIGHT_COPIES * _FLOAT * max(sites, default=0)


def _evaluated(recipe: Recipe, size: ModelSize) -> Iterator[tuple[int, float | None]]:
    """Windows and tokens of every text that is scored: those of the recipe, and the held-out ones of the guard."""
    for settings in recipe.evaluate:
        yield from settings.evaluated_tokens(size.max_positions)
    if recipe.guard.windows and any(each.uses_data() for each in recipe.passes):
        yield recipe.calibration.tokens, recipe.guard.windows * recipe.calibration.tokens


def _evaluating_bytes(model_map: ModelMap, size: ModelSize, window: int, tokens: float | None) -> int:
    """Logits of as many windows as go at once, and what a block computes of them."""
    at_once = window * windows_at_once(window, size.vocabulary)
    rows = at_once if tokens is None else min(at_once, int(max(tokens, window)))
    inside = (sum(site.outputs for site in block.structure.sites) for block in model_map.blocks)
    return _FLOAT * rows * max(size.vocabulary, max(inside, default=0))


def _working_bytes(each: Measuring, block: BlockInfo, tokens: int) -> int:
    """Besides weights and hidden states: one batch inside the block; then its statistics and what solving a site takes.

    Gram matrices of all input groups are there at once; vectors do not count.
    """
    sites = block.structure.sites
    inside = _FLOAT * tokens * sum(site.outputs for site in sites)
    if each.learns:
        inside += _LEARNING_COPIES * _FLOAT * sum(site.outputs * site.inputs for site in sites)
    if not each.solves:
        return inside
    squares = [inputs_of(block, group) ** 2 for group in groups_of(each, block)]
    weights = max((site.outputs * site.inputs for site in sites), default=0)
    solving = _SOLVING_COPIES * max(squares, default=0) + _WEIGHT_COPIES * weights
    return _FLOAT * sum(squares) + max(inside, _FLOAT * solving)


def _baseline_bytes(recipe: Recipe, model_map: ModelMap) -> int:
    """A second block, which the guard compares the first one with."""
    blocks = (sum(site.outputs * site.inputs for site in block.structure.sites) for block in model_map.blocks)
    return _FLOAT * max(blocks, default=0) if recipe.guard.windows and recipe.guard.fall_back else 0


def _gradient_bytes(each: Pass, recipe: Recipe, model_map: ModelMap, size: ModelSize) -> int:
    """Besides the weights, while gradients of the loss are computed; 0 for a pass without gradients."""
    found = each.backward()
    if not found:
        return 0
    most = windows_at_once(recipe.calibration.tokens, size.vocabulary)
    windows = found.windows or recipe.calibration.batch
    with_logits = min(windows, most) * recipe.calibration.tokens
    # where logits are computed in parts, a batch goes through the blocks as a whole
    tokens = windows * recipe.calibration.tokens if found.trained_on or found.recomputes else with_logits
    selects = each.selects if isinstance(each, BlockPass) else lambda _: True
    weights, saved = 0, list[int]()
    for block in model_map.blocks:
        sites = block.structure.sites
        weights += sum(site.outputs * site.inputs for site in sites if selects(block.full(site.name)))
        saved.append(_SAVED_OUTPUTS * sum(site.outputs for site in sites) + _SAVED_HIDDEN * model_map.hidden_size)
    kept = found.copies * weights + found.of_all * size.parameters
    if found.recomputes:
        with_logits = min(with_logits, rows_at_once(size.vocabulary))
        of_token = max(saved, default=0) + len(saved) * model_map.hidden_size
    else:
        of_token = sum(saved)
    return int(_FLOAT * (kept + with_logits * LOGITS_COPIES * size.vocabulary + tokens * of_token))


def groups_of(each: Measuring, block: BlockInfo) -> Iterator[InputGroup]:
    """Input groups with at least one selected site."""
    for group in block.structure.groups:
        if any(each.selects(block.full(name)) for name in group.sites):
            yield group


def inputs_of(block: BlockInfo, group: InputGroup) -> int:
    """How many inputs the sites of a group have."""
    return block.structure.site(group.sites[0]).inputs
