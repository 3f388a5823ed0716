"""RigL: trains a sparse model while its zeros move to less important weights; the sparsity stays constant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.numerics.rigl import drop_and_grow
from llmcompress.numerics.schedule import moved_share
from llmcompress.passes.base import PASSES, Backward, ModelPass, Trait
from llmcompress.passes.pruning.at_init import trained_weight
from llmcompress.passes.pruning.sparse import sparsity
from llmcompress.records.rows import SiteReport
from llmcompress.training.data.base import Windows
from llmcompress.training.job import Job
from llmcompress.training.loop import train
from llmcompress.training.settings import Training


@PASSES.register("rigl")
class RigL(ModelPass):
    """Recover a sparse model, or train one from scratch: weak connections are dropped and as many new ones grow.

    Every site keeps the sparsity that earlier passes gave it.

    Source: Evci et al., arXiv 1911.11134. Differs: a step that changes connections also trains; a dropped connection
    cannot grow back in the same step.
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"zeros"})
    conflicts: ClassVar[Mapping[Trait, str]] = {
        "pattern": "would move zeros out of their N:M groups; `recover` trains with a fixed mask"
    }

    alpha: float = Field(
        0.3, gt=0, le=1, description="fraction of a site's connections replaced per update at first; decays to zero"
    )
    every: int = Field(10, ge=1, description="steps between two updates of the connections")
    until: float = Field(0.75, gt=0, le=1, description="fraction of the steps after which connections are fixed")
    training: Training = Field(default_factory=Training, description="steps, learning rate and batches")

    @override
    def uses_data(self) -> bool:
        return True

    @override
    def backward(self) -> Backward | None:
        training = self.training
        return Backward(of_all=3, windows=training.batch, trained_on=training.windows, lowered=training.lowered)

    @override
    def apply(self, whole: WholeModel) -> list[SiteReport]:
        sites = [site for site in whole.sites() if bool((site.weight_OI == 0).any())]
        if not sites:
            raise CompressError(
                "rigl.nothing-sparse",
                "the model is not sparse: no site contains zeros to reconnect",
                where="rigl",
                fix="put a pruning pass before it: magnitude, wanda, sparsegpt, random, snip",
                exit_code=ExitCode.USAGE,
            )
        with whole.resident() as model:
            connections = Connections(
                [trained_weight(site) for site in sites],
                alpha=self.alpha,
                every=self.every,
                end=max(1, round(self.until * self.training.steps)),
            )
            job = Job("rigl", masks=connections)
            train(model, Windows(whole.context.windows_NT), self.training, whole.context, job=job)
        return [SiteReport(site=site.name, algorithm="rigl", sparsity=sparsity(site.weight_OI)) for site in sites]


class Connections:
    """Which weights are connected, for the training loop; a connected weight may be zero at the moment."""

    def __init__(self, weights: Sequence[nn.Parameter], *, alpha: float, every: int, end: int) -> None:
        self._weights, self._alpha, self._every, self._end = list(weights), alpha, every, end
        self.active = [(weight != 0).detach() for weight in weights]

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Gradients are still those of all weights: the moment to choose which shall grow."""
        moves = step % self._every == 0 and step < self._end
        share = moved_share(step, alpha=self._alpha, end=self._end)
        for index, weight in enumerate(self._weights):
            if weight.grad is None:
                continue
            if moves:
                self._move(index, weight, share, optimizer)
            weight.grad.masked_fill_(~self.active[index], 0)

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """What is not alive is exactly zero."""
        for weight, active in zip(self._weights, self.active, strict=True):
            weight.masked_fill_(~active, 0)

    def state(self) -> dict[str, Tensor]:
        """The living connections: a weight that is zero now need not be dead."""
        return {str(index): active for index, active in enumerate(self.active)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with them."""
        self.active = [state[str(index)].to(active.device) for index, active in enumerate(self.active)]

    def _move(self, index: int, weight: nn.Parameter, share: float, optimizer: Optimizer) -> None:
        assert weight.grad is not None
        active = self.active[index]
        count = int(share * int(active.sum()))
        self.active[index], dropped, grown = drop_and_grow(weight, weight.grad, active, count)
        weight.masked_fill_(dropped | grown, 0)
        for value in optimizer.state.get(weight, {}).values():
            if value.shape == weight.shape:
                value.masked_fill_(dropped | grown, 0)
