"""Depth pruning: removes whole blocks and leaves an ordinary smaller, faster model. N = tokens, D = hidden size."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.depth import drop_blocks
from llmcompress.model.map import ModelMap, SiteInfo
from llmcompress.passes.base import PASSES, ModelPass
from llmcompress.passes.pruning.depth_search import Show, perplexities_without
from llmcompress.records.rows import SiteReport

_MOST_TOKENS = 16384
"""Hidden states that are kept of every depth; more would change a mean cosine by less than blocks differ."""

_BLOCKS, _SCORES = "blocks", "scores"
"""Names of what was decided."""

Scored = list[tuple[int, float]]
"""Blocks in the order in which they go, each with the score it went by."""


@PASSES.register("depth")
class Depth(ModelPass):
    """Remove the least important blocks.

    Source: Men et al., arXiv 2403.03853 (block influence, one shot); Kim et al., arXiv 2402.02834 (perplexity without a
    block); Gromov et al., arXiv 2403.17887 (consecutive blocks, angular distance).
    Differs: angles are averaged over all tokens; Gromov et al. use the last token of every window.
    """

    keeps_codes = True

    decides: ClassVar[bool] = True

    fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="fraction of the blocks to remove (rounded, at least one; 0.25 if nothing is given)",
    )
    count: int | None = Field(None, ge=1, description="instead: how many blocks to remove")
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="instead: which blocks to remove, counted from 0, e.g. [5, 9]; nothing is scored"
    )
    score: Literal["block_influence", "perplexity", "random"] = Field(
        "block_influence",
        description="block_influence: 1 - cosine of a block's input and output; perplexity: of the model without the "
        "block, on calibration windows",
    )
    mode: Literal["one_shot", "greedy", "contiguous"] = Field(
        "one_shot",
        description="one_shot: all by one scoring; greedy: score again after each removal; contiguous: consecutive "
        "blocks, scored together",
    )
    screen: int | None = Field(
        None,
        ge=1,
        description="greedy by perplexity: evaluate only this many blocks per round, those of least influence; "
        "null: all",
    )
    skip_first_token: bool = Field(
        False, description="leave the first token of each window out of block_influence: its state is often an outlier"
    )

    @model_validator(mode="after")
    def _only_options_that_act(self) -> Self:
        given = [name for name in ("fraction", "count", "blocks") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give `{given[0]}` or `{given[1]}`, not both (set one to null)")
        if self.blocks is not None and (not self.blocks or len(set(self.blocks)) < len(self.blocks)):
            raise ValueError("`blocks` must name at least one block, each only once")
        if self.score == "random" and self.mode == "greedy":
            raise ValueError("random blocks need no greedy mode: use one_shot or contiguous")
        if self.screen is not None and (self.score, self.mode) != ("perplexity", "greedy"):
            raise ValueError("`screen` belongs to `score: perplexity, mode: greedy`: every other mode scores once")
        if self.score != "block_influence" and self.skip_first_token:
            raise ValueError(f"skip_first_token applies to block_influence only; the score is {self.score}")
        return self

    @override
    def uses_data(self) -> bool:
        """Always, except for random and for given blocks."""
        return self.score != "random" and self.blocks is None

    @override
    def check(self, model_map: ModelMap) -> None:
        """Refuse to remove every block, or one that is not there.

        Raises: CompressError when none would stay.
        """
        self.blocks_to_remove(len(model_map.blocks))
        missing = [index for index in self.blocks or () if index >= len(model_map.blocks)]
        if missing:
            raise CompressError(
                "depth.no-such-block",
                f"the model has blocks 0 to {len(model_map.blocks) - 1}, not {missing[0]}",
                where="depth: blocks",
                fix="`llmcompress inspect MODEL` lists them",
                exit_code=ExitCode.USAGE,
            )

    @override
    def kept_fraction(self, site: str, info: SiteInfo, model_map: ModelMap) -> float:
        """The fraction of blocks that stay: which ones is not known before."""
        return 1 - self.blocks_to_remove(len(model_map.blocks)) / len(model_map.blocks)

    def blocks_to_remove(self, blocks: int) -> int:
        """How many of so many blocks go.

        Raises: CompressError when none would stay.
        """
        if self.blocks is not None:
            key, wanted = "blocks", len(self.blocks)
        elif self.count is not None:
            key, wanted = "count", self.count
        else:
            key, wanted = "fraction", max(1, round((0.25 if self.fraction is None else self.fraction) * blocks))
        if wanted >= blocks:
            raise CompressError(
                "depth.nothing-left",
                f"cannot remove {wanted} of {blocks} blocks: at least one must stay",
                where=f"depth: {key}",
                fix=f"remove at most {blocks - 1}",
                exit_code=ExitCode.USAGE,
            )
        return wanted

    @override
    def forwards_through_model(self, blocks: int) -> tuple[float, float]:
        """By influence one for every scoring; by perplexity half of one for every candidate, each with its logits."""
        if not self.uses_data():
            return 0.0, 0.0
        count = self.blocks_to_remove(blocks)
        if self.score == "block_influence":
            return float(count if self.mode == "greedy" else 1), 0.0
        if self.mode == "greedy":
            left = range(blocks, blocks - count, -1)
            candidates = [each if self.screen is None else min(self.screen, each) for each in left]
            screened = sum(each < all_of for each, all_of in zip(candidates, left, strict=True))
            return screened + sum(candidates) / 2, float(sum(candidates))
        candidate_sets = blocks if self.mode == "one_shot" else blocks - count + 1
        return candidate_sets / 2, float(candidate_sets)

    @override
    def decide(self, whole: WholeModel) -> dict[str, Tensor]:
        """Which blocks go, in which order, and the score that each went by."""
        if self.blocks is not None:
            return {}
        chosen = self._chosen(whole, self.blocks_to_remove(len(whole.map.blocks)))
        return {
            _BLOCKS: torch.tensor([index for index, _ in chosen]),
            _SCORES: torch.tensor([score for _, score in chosen], dtype=torch.float64),
        }

    @override
    def with_decisions(self, decisions: Mapping[str, Tensor]) -> Self:
        if self.blocks is not None:
            return self
        return type(self).model_validate({"blocks": sorted(decisions[_BLOCKS].tolist())})

    @override
    def apply(self, whole: WholeModel) -> list[SiteReport]:
        """Remove, report one row per removed block under the name that it had."""
        names = [block.name for block in whole.map.blocks]
        decided = self.decide(whole) if whole.decisions is None else whole.decisions
        chosen: list[tuple[int, float | None]] = [(index, None) for index in self.blocks or ()]
        if self.blocks is None:
            scores = [None if self.score == "random" else score for score in decided[_SCORES].tolist()]
            chosen = list(zip(decided[_BLOCKS].tolist(), scores, strict=True))
        drop_blocks(whole.model, [index for index, _ in chosen])
        return [
            SiteReport(
                site=names[index],
                algorithm="depth",
                removed=1,
                parameters=0,
                score=score,
                tokens=whole.context.windows_NT.numel() if self.uses_data() else None,
            )
            for index, score in chosen
        ]

    def _chosen(self, whole: WholeModel, count: int) -> Scored:
        blocks = range(len(whole.map.blocks))
        if self.mode == "contiguous":
            runs = [tuple(range(start, start + count)) for start in blocks[: len(blocks) - count + 1]]
            scores = self._scores(whole, runs, _shown(whole, "scoring blocks"), span=count)
            best = min(range(len(runs)), key=scores.__getitem__)
            return [(index, scores[best]) for index in runs[best]]
        if self.mode == "one_shot":
            return self._ranked(whole, (), list(blocks), _shown(whole, "scoring blocks"))[:count]
        chosen: Scored = []
        while len(chosen) < count:
            gone = tuple(index for index, _ in chosen)
            left = [index for index in blocks if index not in gone]
            text = f"choosing block {len(chosen) + 1} of {count} to remove"
            show = _shown(whole, text, part=len(chosen), parts=count)
            if self.screen is not None and self.screen < len(left):
                moved = distances(whole, influence, _silent, span=1, skipped=gone)
                ranked = sorted(zip(left, moved, strict=True), key=lambda pair: pair[1])
                left = sorted(index for index, _ in ranked[: self.screen])
            chosen += self._ranked(whole, gone, left, show)[:1]
        return chosen

    def _ranked(self, whole: WholeModel, gone: tuple[int, ...], left: Sequence[int], show: Show) -> Scored:
        scores = self._scores(whole, [(*gone, index) for index in left], show, skipped=gone)
        return sorted(zip(left, scores, strict=True), key=lambda pair: pair[1])

    def _scores(
        self,
        whole: WholeModel,
        candidates: Sequence[tuple[int, ...]],
        show: Show,
        *,
        skipped: Collection[int] = (),
        span: int = 1,
    ) -> list[float]:
        """One score per candidate, the set of blocks that would be missing; the lowest goes."""
        if self.score == "random":
            order = torch.randperm(len(candidates), generator=whole.context.generator()).tolist()
            return [float(place) for place in order]
        if self.score == "perplexity":
            return perplexities_without(whole, candidates, show)
        distance = angle if self.mode == "contiguous" else influence
        return distances(whole, distance, show, span=span, skipped=skipped, first=int(self.skip_first_token))


def _shown(whole: WholeModel, text: str, *, part: int = 0, parts: int = 1) -> Show:
    """Shows the fraction done of one of several equal parts."""

    def show(fraction: float) -> None:
        whole.context.progress.substep(text, done=round(1000 * (part + fraction)), total=1000 * parts)

    return show


def _silent(_: float) -> None:
    """For what is short beside the rest."""


def influence(before_ND: Tensor, after_ND: Tensor) -> float:
    """1 - mean cosine, from 0 (the states keep their direction) to 2.

    Source: Men et al., arXiv 2403.03853, equation 1.
    """
    return 1 - float(functional.cosine_similarity(before_ND, after_ND, dim=-1).double().mean())


def angle(before_ND: Tensor, after_ND: Tensor) -> float:
    """Mean angle between states, in half turns: from 0 to 1.

    Source: Gromov et al., arXiv 2403.17887, equation 6.
    """
    cosine_N = functional.cosine_similarity(before_ND, after_ND, dim=-1).double().clamp(-1, 1)
    return float(cosine_N.arccos().mean()) / math.pi


def distances(
    whole: WholeModel,
    distance: Callable[[Tensor, Tensor], float],
    show: Show,
    *,
    span: int,
    skipped: Collection[int],
    first: int = 0,
) -> list[float]:
    """How far each run of `span` blocks moves the hidden states; blocks in `skipped` do nothing and have no score.

    Positions before `first` are ignored. One stream over the blocks; the states of the last `span` depths are kept.
    """
    found = []
    earlier: deque[Tensor] = deque(maxlen=span)
    for work in whole.stream():
        show(work.info.index / len(whole.map.blocks))
        if work.info.index in skipped:
            work.replace_module(work.module, work.inputs())
            continue
        earlier.append(_states(work.inputs(), first))
        outputs = work.outputs()
        work.replace_module(work.module, outputs)  # fed onward as they are, not computed again
        if len(earlier) == span:
            found.append(distance(earlier[0], _states(outputs, first)))
    return found


def _states(batches: Sequence[Tensor], first: int) -> Tensor:
    """Hidden states as N×D, evenly thinned out where there are very many."""
    tokens = sum(batch.shape[0] * max(batch.shape[1] - first, 0) for batch in batches)
    step = math.ceil(tokens / _MOST_TOKENS) or 1
    return torch.cat([batch[:, first:].flatten(0, 1)[::step] for batch in batches]).float()
