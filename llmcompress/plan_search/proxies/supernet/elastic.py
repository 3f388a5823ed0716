"""Elastic training: all sub-networks of a model learn from the dense model at once, larger ones before smaller ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.units import unit_groups
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.proxies.base import Candidates, Text, TextJudge
from llmcompress.plan_search.proxies.supernet.nested import SubNet, running_as, sort_channels, subnet_of
from llmcompress.plan_search.space import DROPPED
from llmcompress.training.adapters import adapted
from llmcompress.training.data.base import Windows
from llmcompress.training.job import Job
from llmcompress.training.loop import train
from llmcompress.training.masks import ZerosStay
from llmcompress.training.objectives.base import Objective, ObjectiveInputs
from llmcompress.training.objectives.kl import KL
from llmcompress.training.settings import Training
from llmcompress.training.teacher import ModelTeacher


class ElasticSettings(BaseModel):
    """How a supernet is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    training: Training = Training(steps=100, learning_rate=2e-4)
    """Of each phase: phase after phase one more body may be chosen, in the last one blocks may be dropped too."""
    drawn: int = Field(default=2, ge=0)
    """Sub-networks drawn at random in every step, beside the largest and the smallest."""
    rank: int | None = Field(default=None, ge=1)
    """Rank of LoRA adapters on every linear, which are merged at the end; None: all weights are trained."""
    score: str = "activation"
    """By which channels are sorted; scores as in `width`."""

    @field_validator("training")
    @classmethod
    def _keeps_activations(cls, training: Training) -> Training:
        if training.gradient_checkpointing:
            raise ValueError("sub-networks are not there any more when blocks are computed again: no checkpointing")
        return training


Draw = Callable[[np.random.Generator], SubNet]
"""One sub-network; the smallest one may drop different blocks each time."""


class Sandwich(Objective):
    """Mean of KL(teacher ‖ sub-network) over the largest, the smallest and some random sub-networks.

    Source: Yu and Huang, arXiv 1903.05134, section 3 (sandwich rule); Cai et al., arXiv 1908.09791 (OFA: the trained
    network of full size teaches all of them).
    """

    def __init__(self, whole: WholeModel, smallest: Draw, draws: Sequence[Draw]) -> None:
        self._whole, self._draws = whole, (smallest, *draws)

    @override
    def needs_teacher(self) -> bool:
        return True

    @override
    def loss(self, inputs: ObjectiveInputs) -> Tensor:
        random = np.random.default_rng((self._whole.context.seed, inputs.step))
        kl = KL()
        total = inputs.mean_over_tokens(kl.per_token)
        for draw in self._draws:
            with running_as(self._whole.model, self._whole.map, draw(random)):
                student = inputs.again()
            total = total + replace(inputs, student=student).mean_over_tokens(kl.per_token)
        return total / (1 + len(self._draws))


def trained_supernet(whole: WholeModel, space: PlanSpace, settings: ElasticSettings) -> WholeModel:
    """A copy of the model whose sub-networks are the bodies of the space, trained on the calibration windows.

    For models that fit into memory twice, with gradients. Source: Cai et al., arXiv 1908.09791, section 3.2
    (progressive shrinking: sizes are added step by step, the smaller ones after the larger ones); Devvrit et al.,
    arXiv 2310.07707 (MatFormer: nested feed-forward networks).
    """
    nested = WholeModel(copy.deepcopy(whole.model), whole.map, replace(whole.context, keep=None))
    sort_channels(nested, score=settings.score)
    for number, phase in enumerate(phases(space)):
        sandwich = Sandwich(nested, partial(smallest, phase), [partial(drawn, phase)] * settings.drawn)
        with whole.resident() as dense, nested.resident() as model, _trained_part(nested, settings) as parameters:
            train(
                model,
                Windows(nested.context.windows_NT),
                settings.training,
                nested.context,
                objective=sandwich,
                teacher=ModelTeacher(dense, nested.context.device),
                job=Job(f"supernet, phase {number + 1}", parameters, ZerosStay([]) if parameters else None),
            )
    return nested


def drawn(space: PlanSpace, random: np.random.Generator) -> SubNet:
    """Any size of the space."""
    return subnet_of(space, space.random(random))


def smallest(space: PlanSpace, random: np.random.Generator) -> SubNet:
    """The narrowest body everywhere, and as many blocks dropped, at random, as may be."""
    plan = list((0,) * len(space.units))
    narrow = min(space.space.bodies, key=lambda body: _size(space, body))
    for index in space.bodies:
        plan[index] = space.units[index].options.index(narrow)
    for index in random.permutation(space.bodies).tolist():
        if DROPPED in space.units[index].options:
            dropped = [*plan[:index], space.units[index].options.index(DROPPED), *plan[index + 1 :]]
            plan = dropped if space.is_legal(tuple(dropped)) else plan
    return subnet_of(space, tuple(plan))


@contextmanager
def _trained_part(whole: WholeModel, settings: ElasticSettings) -> Iterator[list[nn.Parameter] | None]:
    """Parameters of adapters; None: all of the model."""
    if settings.rank is None:
        yield None
        return
    with adapted(whole.sites(), rank=settings.rank, scale=2.0, seed=whole.context.seed) as parameters:
        yield parameters


def phases(space: PlanSpace) -> list[PlanSpace]:
    """The space with its widest bodies alone, then with more of them; dropping comes last.

    Raises: CompressError for a space without any.
    """
    whole_body, *others = space.space.bodies
    ordered = [whole_body, *sorted(others, key=lambda body: _size(space, body), reverse=True)]
    cut = [{name: space.space.bodies[name] for name in ordered[:count]} for count in range(2, len(ordered) + 1)]
    spaces = [space.space.model_copy(update={"bodies": bodies, "most_dropped": 0.0}) for bodies in cut]
    if space.space.most_dropped > 0:
        spaces.append(space.space)
    if not spaces:
        raise CompressError(
            "search.one-size",
            "this space has models of one size only: there is nothing that a supernet could share",
            where="bodies, most_dropped",
            fix="add bodies such as `narrow: [{width: {fraction: 0.25, heads: false}}]`, or set `most_dropped`",
            exit_code=ExitCode.USAGE,
        )
    return [PlanSpace(each, space.model_map) for each in spaces]


def _size(space: PlanSpace, body: str) -> int:
    """Minus the number of channels that this body removes everywhere."""
    plan = [unit.options.index(body) if unit.kind == "body" else 0 for unit in space.units]
    units = {group.name: group.units for group in unit_groups(space.model_map)}
    return sum(kept - units[name] for name, kept in subnet_of(space, tuple(plan)).kept.items())


class SupernetJudge(TextJudge[Text]):
    """Plans judged by the sub-network that they choose: of depth and widths alone, linears are dense.

    What APQ learns its first predictor from; a supernet costs one training, a plan then one forward pass.
    """

    def __init__(
        self, candidates: Candidates[Text], windows_NT: Tensor, supernet: WholeModel, space: PlanSpace
    ) -> None:
        super().__init__(candidates, windows_NT)
        self._supernet, self._space = supernet, space

    @property
    @override
    def fingerprint(self) -> str:
        return "by the sub-network"

    @override
    def divergences(self, plan: Plan, text: Text) -> Tensor:
        model = self._supernet.model
        with running_as(model, self._supernet.map, subnet_of(self._space, plan)):
            return self.candidates.divergences_of(model, text)
