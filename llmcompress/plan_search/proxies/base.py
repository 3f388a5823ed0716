"""What a judge of candidates is: a plan and a number of tokens → a loss; and the judge that all others change.

N = windows, T = tokens of a window.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import Generic, Protocol, TypeVar

from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.problem import Outcome, Proposal

Result = TypeVar("Result")


Text = TypeVar("Text")
"""Windows, with what the dense model predicts on them."""


class Candidates(Protocol[Text]):
    """What makes candidates and runs them: a `Bench` of levels inside its context."""

    def text(self, windows_NT: Tensor) -> Text:
        """Windows with the dense model's predictions, which are computed once."""

    def divergences(self, plan: Plan, text: Text) -> Tensor:
        """N: mean KL(dense ‖ candidate) per token of every window, in nats."""

    def assembled(self, plan: Plan) -> PreTrainedModel:
        """The candidate as an ordinary model of its own."""

    def divergences_of(self, model: PreTrainedModel, text: Text) -> Tensor:
        """N: the same of any model."""


class Judge(ABC):
    """Says how far a candidate is from the dense model."""

    @abstractmethod
    def loss(self, plan: Plan, tokens: int) -> float:
        """Mean KL divergence from the dense model per token, in nats, on about so many tokens of text."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes with what is done to candidates before they are judged; not with their levels, nor with the text."""


class TextJudge(Judge, Generic[Text]):
    """A judge on the first windows of one text, so that more tokens contain fewer; predictions of the dense model on
    them are computed once."""

    def __init__(self, candidates: Candidates[Text], windows_NT: Tensor) -> None:
        assert len(windows_NT), "a judge needs text"
        self.candidates, self._windows_NT = candidates, windows_NT
        self._texts: dict[int, Text] = {}

    @override
    def loss(self, plan: Plan, tokens: int) -> float:
        return float(self.divergences(plan, self._text(tokens)).double().mean())

    @abstractmethod
    def divergences(self, plan: Plan, text: Text) -> Tensor:
        """Of every window."""

    def _text(self, tokens: int) -> Text:
        count = min(len(self._windows_NT), math.ceil(tokens / self._windows_NT.shape[1]))
        if count not in self._texts:
            self._texts[count] = self.candidates.text(self._windows_NT[:count])
        return self._texts[count]


class StreamedJudge(TextJudge[Text]):
    """Candidates as they come from their levels, run block by block."""

    @property
    @override
    def fingerprint(self) -> str:
        return "as it is"

    @override
    def divergences(self, plan: Plan, text: Text) -> Tensor:
        return self.candidates.divergences(plan, text)


class Change(Protocol):
    """Something that is done to a candidate before it is judged: healing, a short training."""

    @property
    def fingerprint(self) -> str:
        """Its options."""

    def __call__(self, plan: Plan, model: PreTrainedModel) -> PreTrainedModel:
        """The changed candidate; the given one may be changed in place."""


class ChangedJudge(TextJudge[Text]):
    """Candidates put together as models and changed, one change after the other, before they are judged."""

    def __init__(self, candidates: Candidates[Text], windows_NT: Tensor, changes: Sequence[Change] = ()) -> None:
        super().__init__(candidates, windows_NT)
        self._changes = tuple(changes)

    @property
    @override
    def fingerprint(self) -> str:
        return "; ".join(["put together", *(change.fingerprint for change in self._changes)])

    @override
    def divergences(self, plan: Plan, text: Text) -> Tensor:
        model = self.candidates.assembled(plan)
        for change in self._changes:
            model = change(plan, model)
        return self.candidates.divergences_of(model, text)


def answered(
    steps: Generator[Sequence[Proposal], Sequence[Outcome], Result], judge: Judge
) -> tuple[list[Outcome], Result]:
    """Run proposals to their end with this judge: every outcome, and what they return."""
    outcomes: list[Outcome] = []
    try:
        asked = next(steps)
        while True:
            told = [Outcome(each.plan, each.tokens, judge.loss(each.plan, each.tokens)) for each in asked]
            outcomes += told
            asked = steps.send(told)
    except StopIteration as end:
        return outcomes, end.value
