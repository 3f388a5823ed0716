"""`MixedModel`: the model with a mixture of options everywhere, and the gradient of its loss in every share.

B = sequences, T = tokens, D = hidden size, R = rows, X = width of what the head reads, O = outputs, I = inputs.

A linear's weight is the sum of share × weight over its options. A block gives the sum of share × output over its
bodies, of which the dropped one gives its input. So a mixture of a single option is the plan's own model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from llmcompress.model.skeleton import BlockCall, put_module
from llmcompress.modules.base import CompressedModule
from llmcompress.plan_search.levels.decoded import DecodedLevels
from llmcompress.plan_search.levels.judged import JudgedText
from llmcompress.plan_search.levels.outside import Outside
from llmcompress.plan_search.plan_space import PlanSpace
from llmcompress.plan_search.problem import Relaxation
from llmcompress.plan_search.space import DROPPED


@dataclass(frozen=True)
class _Units:
    """Which units decide about a block, by their index."""

    body: int
    sites: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Given:
    """A text in front of the first block: states and calls batch by batch, and what stands around the blocks."""

    text: JudgedText
    states: Sequence[Tensor]
    calls: Sequence[Sequence[BlockCall]]
    outside: Outside


class MixedModel(Relaxation):
    """After one choice of `before` and one of `after`: their units get no gradient. Roundings of inputs are left out.

    Blocks are run again on the way back, so that no more than one of them holds what its gradient needs.
    """

    def __init__(self, space: PlanSpace, levels: DecodedLevels, given: Given) -> None:
        self._space, self._levels, self._given = space, levels, given
        # forwards and again on the way back, once for every body
        self.tokens = given.text.batches[0].numel() * 2 * len(space.space.bodies)
        self._units = [_units(space, info.index) for info in space.model_map.blocks]

    @override
    def loss_and_gradient(self, mixture: Sequence[np.ndarray], step: int) -> tuple[float, list[np.ndarray]]:
        batch = step % len(self._given.text.batches)
        gradients = [np.zeros(len(unit.options)) for unit in self._space.units]
        states = [self._given.states[batch]]
        with torch.no_grad():
            for index in range(len(self._units)):
                states.append(self._block(index, states[-1], mixture, batch).output)
        loss, felt_BTD = self._loss(batch, states.pop())
        for index in reversed(range(len(self._units))):
            felt_BTD = self._back(index, states.pop(), felt_BTD, mixture, (batch, gradients))
        return loss, gradients

    def _block(self, index: int, hidden_BTD: Tensor, mixture: Sequence[np.ndarray], batch: int) -> _Mixed:
        """What the mixture of bodies gives; those without a share are not run."""
        unit, call = self._units[index], self._given.calls[batch][index]
        weights: dict[str, dict[str, list[nn.Parameter]]] = {}
        outputs: dict[str, Tensor] = {}
        terms: list[Tensor] = []
        for body, share in zip(self._space.units[unit.body].options, mixture[unit.body].tolist(), strict=True):
            if not share:
                continue
            outputs[body] = hidden_BTD
            if body != DROPPED:
                module, weights[body] = self._module(index, body, mixture)
                outputs[body] = call.run(module, hidden_BTD)
            terms.append(outputs[body] if share == 1 else outputs[body] * share)
        output_BTD = torch.stack(terms).sum(0) if len(terms) > 1 else terms[0] if terms else hidden_BTD * 0
        return _Mixed(output_BTD, outputs, weights)

    def _module(
        self, index: int, body: str, mixture: Sequence[np.ndarray]
    ) -> tuple[nn.Module, dict[str, list[nn.Parameter]]]:
        """The block with that body and mixed linears; their parameters by site."""
        module = self._levels.shell(index, body).module
        found = {}
        for site, unit in self._units[index].sites.items():
            weight_OI, bias_O = self._sum(index, body, site, mixture[unit])
            linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None, device="meta")
            linear.weight = nn.Parameter(weight_OI)
            if bias_O is not None:
                linear.bias = nn.Parameter(bias_O)
            put_module(module, site, linear)
            found[site] = list(linear.parameters())
        return module, found

    def _sum(self, index: int, body: str, site: str, shares: np.ndarray) -> tuple[Tensor, Tensor | None]:
        weight_OI: Tensor | None = None
        bias_O: Tensor | None = None
        for option, share in zip(self._space.space.sites, shares.tolist(), strict=True):
            if share:
                own_OI, own_O = matrix(self._levels.linear(index, body, site, option))
                weight_OI = own_OI * share if weight_OI is None else weight_OI.add_(own_OI, alpha=share)
                if own_O is not None:
                    bias_O = own_O * share if bias_O is None else bias_O + own_O * share
        if weight_OI is None:  # no share at all: a weight of zeros
            own_OI, own_O = matrix(self._levels.linear(index, body, site, next(iter(self._space.space.sites))))
            return torch.zeros_like(own_OI), None if own_O is None else torch.zeros_like(own_O)
        return weight_OI, bias_O

    def _loss(self, batch: int, hidden_BTD: Tensor) -> tuple[float, Tensor]:
        """Mean divergence per token and its gradient in the last states."""
        with torch.enable_grad():
            hidden_BTD = hidden_BTD.detach().requires_grad_(True)
            predicted = self._given.outside.predictions(self._given.text.batches[batch], hidden_BTD)
            values_RX = predicted.values_RX.detach().requires_grad_(True)
            loss = 0.0
            for part in self._given.text.parts(batch, predicted.with_values(values_RX)):
                mean = part.sum() / len(values_RX)
                mean.backward()  # type: ignore[no-untyped-call]
                loss += float(mean.detach())
            assert values_RX.grad is not None
            (felt_BTD,) = torch.autograd.grad(predicted.values_RX, hidden_BTD, values_RX.grad)
        return loss, felt_BTD

    def _back(
        self,
        index: int,
        hidden_BTD: Tensor,
        felt_BTD: Tensor,
        mixture: Sequence[np.ndarray],
        into: tuple[int, list[np.ndarray]],
    ) -> Tensor:
        """Add the gradients of the block's shares; returns that of its input."""
        batch, gradients = into
        unit = self._units[index]
        hidden_BTD = hidden_BTD.detach().requires_grad_(True)
        with torch.enable_grad():
            mixed = self._block(index, hidden_BTD, mixture, batch)
            parameters = [each for sites in mixed.weights.values() for own in sites.values() for each in own]
            back_BTD, *felt = torch.autograd.grad(mixed.output, [hidden_BTD, *parameters], felt_BTD)
        by_parameter = dict(zip(map(id, parameters), felt, strict=True))
        with torch.no_grad():
            for place, body in enumerate(self._space.units[unit.body].options):
                output_BTD = self._alone(index, body, hidden_BTD, mixture, batch, mixed)
                gradients[unit.body][place] += float((felt_BTD * output_BTD).sum(dtype=torch.float64))
            for body, sites in mixed.weights.items():
                for site, own in sites.items():
                    felt_own = [by_parameter[id(each)] for each in own]
                    gradients[unit.sites[site]] += self._in_shares(index, body, site, felt_own)
        return back_BTD

    def _alone(
        self, index: int, body: str, hidden_BTD: Tensor, mixture: Sequence[np.ndarray], batch: int, mixed: _Mixed
    ) -> Tensor:
        """What the block gives with that body alone."""
        if body in mixed.outputs:
            return mixed.outputs[body]
        if body == DROPPED:
            return hidden_BTD
        return self._given.calls[batch][index].run(self._module(index, body, mixture)[0], hidden_BTD)

    def _in_shares(self, index: int, body: str, site: str, felt: Sequence[Tensor]) -> np.ndarray:
        """<gradient of the mixed weight, weight of the option>, for every option; biases likewise."""
        found = []
        for option in self._space.space.sites:
            values = [each for each in matrix(self._levels.linear(index, body, site, option)) if each is not None]
            products = (float((one * other).sum(dtype=torch.float64)) for one, other in zip(felt, values, strict=False))
            found.append(sum(products))
        return np.array(found)


@dataclass
class _Mixed:
    """A block's output, those of its bodies, and the parameters of their linears."""

    output: Tensor
    outputs: dict[str, Tensor]
    weights: dict[str, dict[str, list[nn.Parameter]]]


def matrix(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight O×I and the bias of a linear of any kind."""
    if isinstance(module, CompressedModule):
        return module.dense_weight(), module.dense_bias()
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    return (weight.T if isinstance(module, Conv1D) else weight).detach(), None if bias is None else bias.detach()


def _units(space: PlanSpace, block: int) -> _Units:
    body = next(index for index in space.bodies if block in space.units[index].blocks)
    return _Units(body, {site: unit for unit in space.inside(body) for site in space.units[unit].sites})
