"""`Bench`: candidates put together from levels, and how far their predictions are from those of the dense model.

N = windows, T = tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.calibration.stream import sharing_tensors
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.skeleton import BlockCall
from llmcompress.numerics.loss import in_batches
from llmcompress.plan_search.levels.assembly import assemble, is_table, with_tables
from llmcompress.plan_search.levels.before import model_after
from llmcompress.plan_search.levels.byte_cache import ByteCache
from llmcompress.plan_search.levels.decoded import DecodedLevels, Shell
from llmcompress.plan_search.levels.judged import JudgedText, dense_top, judged, key_of
from llmcompress.plan_search.levels.outside import Outside
from llmcompress.plan_search.levels.path import Step, path_of, whole_model_choices
from llmcompress.plan_search.levels.relaxation import Given, MixedModel
from llmcompress.plan_search.levels.store import LevelStore
from llmcompress.plan_search.plan_space import Plan, PlanSpace

DECODED_BYTES = 2**31
"""Of decoded weights that are kept."""

STATES_BYTES = 2**30
"""Of hidden states between blocks that are kept for plans that begin alike."""


@dataclass(frozen=True, eq=False)
class _Started:
    """A text in front of the first block."""

    states: list[Tensor]
    """Batch by batch."""
    calls: list[list[BlockCall]]
    """Batch by batch, how every block is called."""


class Bench:
    """Use it as a context manager: meanwhile the model is on the context's device and must not be changed."""

    def __init__(
        self,
        whole: WholeModel,
        space: PlanSpace,
        store: LevelStore,
        *,
        decoded_bytes: int = DECODED_BYTES,
        states_bytes: int = STATES_BYTES,
    ) -> None:
        self._whole, self._space, self._store = whole, space, store
        self._decoded: ByteCache[nn.Module | Shell] = ByteCache(decoded_bytes)
        self._states: ByteCache[list[Tensor]] = ByteCache(states_bytes)
        self._stack = ExitStack()
        self._models: dict[str, WholeModel] = {}
        self._levels: dict[str, DecodedLevels] = {}
        self._outsides: dict[tuple[str, str], Outside] = {}
        self._texts: dict[str, JudgedText] = {}
        self._started: dict[tuple[tuple[str, str], str], _Started] = {}

    def __enter__(self) -> Self:
        self._stack.enter_context(self._whole.resident())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @torch.no_grad()
    def text(self, windows_NT: Tensor) -> JudgedText:
        """These windows with what the dense model predicts on them, computed once."""
        key = key_of(windows_NT)
        if key not in self._texts:
            batches = [ids_BT[:, :-1] for ids_BT in self._batches(windows_NT)]
            outside = self._outside(*self._names(0, 0))
            blocks = [block for _, block in outside.named]
            found = []
            for ids_BT in batches:
                recording = outside.start(ids_BT)
                hidden_BTD = recording.hidden
                for call, block in zip(recording.calls, blocks, strict=True):
                    hidden_BTD = call.run(block, hidden_BTD)
                found.append(dense_top(outside.predictions(ids_BT, hidden_BTD)))
            self._texts[key] = judged(windows_NT, batches, found)
        return self._texts[key]

    @torch.no_grad()
    def divergences(self, plan: Plan, text: JudgedText) -> Tensor:
        """Mean KL(dense ‖ candidate) per token of every window, N, float64; not finite where the candidate is not.

        The states in front of the first block in which a plan differs from earlier ones are not computed again.
        """
        plan = self._space.canonical(plan)
        before, after = whole_model_choices(self._space, plan)
        if self._space.space.after[after] and not is_table(self._space, after):
            return self.divergences_of(self.assembled(plan), text)
        states = self._last_states(before, after, path_of(self._space, plan), text)
        outside = self._outside(before, after)
        return torch.cat(
            [
                text.divergences(batch, outside.predictions(ids_BT, hidden_BTD))
                for batch, (ids_BT, hidden_BTD) in enumerate(zip(text.batches, states, strict=True))
            ]
        )

    @torch.no_grad()
    def divergences_of(self, model: PreTrainedModel, text: JudgedText) -> Tensor:
        """The same of any model with the same tokens: one that was put together and trained, for instance."""
        model = model.to(self._whole.context.device, torch.float32).eval()
        outside, found = Outside(model), []
        for batch, ids_BT in enumerate(text.batches):
            recording = outside.start(ids_BT)
            hidden_BTD = recording.hidden
            for call, (_, block) in zip(recording.calls, outside.named, strict=True):
                hidden_BTD = call.run(block, hidden_BTD)
            found.append(text.divergences(batch, outside.predictions(ids_BT, hidden_BTD)))
        return torch.cat(found)

    def assembled(self, plan: Plan) -> PreTrainedModel:
        """An ordinary model, on the CPU, as `compress` would have left it: it can be saved, exported, trained."""
        plan = self._space.canonical(plan)
        before, after = whole_model_choices(self._space, plan)
        whole = self._model(before)
        model = copy.deepcopy(whole.model).to("cpu")
        steps = path_of(self._space, plan)
        context = replace(self._whole.context, keep=None, state=None)
        return assemble(model, steps, self.levels(before), self._space.space.after[after], context)

    def relaxation(self, text: JudgedText, *, before: str | None = None, after: str | None = None) -> MixedModel:
        """The mixture of options, judged on one batch of the text at a time; `before` and `after` are fixed, by default
        to the first choices. Choices of `after` that train count as nothing."""
        names = before or self._names(0, 0)[0], after or self._names(0, 0)[1]
        started = self._start(*names, text)
        given = Given(text, started.states, started.calls, self._outside(*names))
        return MixedModel(self._space, self.levels(names[0]), given)

    def levels(self, before: str) -> DecodedLevels:
        """Levels of the dense model, or of what that choice made of it."""
        if before not in self._levels:
            number = list(self._space.space.before).index(before)
            self._levels[before] = DecodedLevels(self._model(before), self._store, number, self._decoded)
        return self._levels[before]

    def _last_states(self, before: str, after: str, path: Sequence[Step], text: JudgedText) -> list[Tensor]:
        """What the last block gives, batch by batch."""
        levels, started = self.levels(before), self._start(before, after, text)
        table = after if is_table(self._space, after) else ""
        keys = [(before, table, text.key, tuple(path[:depth])) for depth in range(len(path) + 1)]
        states, known = started.states, 0
        for depth in range(len(path), 0, -1):
            kept = self._states.get(keys[depth])
            if kept is not None and known == 0:
                states, known = kept, depth
        held = sum(hidden_BTD.numel() * hidden_BTD.element_size() for hidden_BTD in states)
        every = max(1, -(-2 * held * len(path) // max(self._states.limit_bytes, 1)))
        for depth, step in enumerate(path[known:], start=known + 1):
            block = levels.block(step)
            states = [
                calls[step.block].run(block, hidden_BTD)
                for calls, hidden_BTD in zip(started.calls, states, strict=True)
            ]
            if depth % every == 0:
                self._states.put(keys[depth], states, held)
        for key in reversed(keys):  # what most plans share was used last
            self._states.get(key)
        return states

    def _start(self, before: str, after: str, text: JudgedText) -> _Started:
        key = ((before, after), text.key)
        if key not in self._started:
            outside = self._outside(before, after)
            recordings = [outside.start(ids_BT) for ids_BT in text.batches]
            first = recordings[0].calls
            calls = [
                [sharing_tensors(call, same) for call, same in zip(each.calls, first, strict=True)]
                for each in recordings
            ]
            self._started[key] = _Started([each.hidden for each in recordings], calls)
        return self._started[key]

    def _model(self, before: str) -> WholeModel:
        if before not in self._models:
            found = model_after(self._whole, self._space, self._store, before)
            if found is not self._whole:
                self._stack.enter_context(found.resident())
            self._models[before] = found
        return self._models[before]

    def _outside(self, before: str, after: str) -> Outside:
        """Of the dense model after these choices; blocks are not its own business."""
        key = (before, after)
        if key not in self._outsides:
            model = self._model(before).model
            if is_table(self._space, after):
                model = with_tables(self._model(before), self._space.space.after[after])
            self._outsides[key] = Outside(model)
        return self._outsides[key]

    def _names(self, before: int, after: int) -> tuple[str, str]:
        return list(self._space.space.before)[before], list(self._space.space.after)[after]

    def _batches(self, windows_NT: Tensor) -> Sequence[Tensor]:
        vocabulary = self._whole.model.config.get_text_config().vocab_size
        return in_batches(windows_NT, self._whole.context.batch, vocabulary)
