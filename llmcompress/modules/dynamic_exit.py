"""Early exit: a token with a confident prediction skips the remaining blocks. B, T, D as in dynamic.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.modules.base import MODULES, Spec
from llmcompress.modules.dynamic import DynamicBlock
from llmcompress.modules.linear_predictor import LinearPredictor

LOGITS_AT_ONCE = 2**24
"""Elements of one matrix of logits: longer prompts are processed in pieces of that size."""


class Exits:
    """What the exit blocks of one model tell each other during a forward pass."""

    def __init__(self) -> None:
        self.checks: list[ExitBlock] = []
        """Blocks before which a token may leave, in order."""
        self.taken_BT: Tensor | None = None
        """Index in `checks` where each token left; -1: nowhere yet."""


@MODULES.register("exit_block")
class ExitBlock(DynamicBlock):
    """A block that tokens skip once they have left; with a threshold, one before which they may leave.

    A token leaves when it is as sure as `threshold` (above 1: never). With `jump_DD`, the state it leaves with is
    carried to where the last block would have brought it by a linear map, and the model goes on with that state behind
    its last block. How sure it is comes from `predictor`: a linear predictor of how far (in nats) the
    prediction made here would be from the model's own, as exp(-divergence); without one, the largest probability
    that the model's own head gives here, for which `readout` names the modules from the last block to the logits.
    All blocks from the first exit on must be exit blocks, so that keys and values are stored in every one.
    """

    jump_DD: nn.Parameter | None
    jump_D: nn.Parameter | None
    predictor: LinearPredictor | None

    def __init__(
        self,
        threshold: float | None,
        readout: Sequence[str],
        jump: tuple[Tensor, Tensor] | None,
        predictor: LinearPredictor | None = None,
    ) -> None:
        super().__init__()
        self.predictor = predictor
        self.threshold, self.readout = threshold, tuple(readout)
        self.jump_DD = None if jump is None else nn.Parameter(jump[0], requires_grad=False)
        self.jump_D = None if jump is None else nn.Parameter(jump[1], requires_grad=False)
        self._exits = Exits()
        self._read: tuple[nn.Module, ...] = ()
        self._first = self._last = True

    @override
    def spec(self) -> Spec:
        width = None if self.jump_D is None else len(self.jump_D)
        predictor = None if self.predictor is None else self.predictor.spec()
        return {"threshold": self.threshold, "readout": list(self.readout), "jump": width, "predictor": predictor}

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        width = spec["jump"]
        jump = None if width is None else (torch.zeros(width, width, dtype=dtype), torch.zeros(width, dtype=dtype))
        predictor = None if spec["predictor"] is None else LinearPredictor.from_spec(spec["predictor"], dtype)
        return cls(spec["threshold"], spec["readout"], jump, predictor)

    @override
    def connect(self, model: nn.Module) -> None:
        """Find the other exit blocks and the modules of the readout."""
        together = [part for part in model.modules() if isinstance(part, ExitBlock)]
        self._exits = together[0]._exits
        self._exits.checks = [part for part in together if part.threshold is not None]
        self._first, self._last = self is together[0], self is together[-1]
        self._read = tuple(model.get_submodule(name) for name in self.readout)

    @override
    def skips(self, hidden_BTD: Tensor) -> Tensor:
        shape, taken_BT = hidden_BTD.shape[:2], self._exits.taken_BT
        if self._first or taken_BT is None or taken_BT.shape != shape:
            taken_BT = torch.full(shape, -1, device=hidden_BTD.device)
        taken_BT = taken_BT.to(hidden_BTD.device)
        waiting_BT = taken_BT < 0
        if self.threshold is not None and self.threshold <= 1 and waiting_BT.any():
            sure_N = self.confidence(hidden_BTD[waiting_BT]) >= self.threshold
            here = self._exits.checks.index(self)
            taken_BT = taken_BT.masked_scatter(waiting_BT, torch.where(sure_N, here, -1))
        self._exits.taken_BT = taken_BT
        return taken_BT >= 0

    @override
    def leave(self, hidden_BTD: Tensor) -> Tensor:
        """Behind the last block, carry the tokens that left earlier to where they would be."""
        taken_BT = self._exits.taken_BT
        if not self._last or taken_BT is None:
            return hidden_BTD
        self._exits.taken_BT = None
        for index, check in enumerate(self._exits.checks):
            here_BT = taken_BT == index
            if check.jump_DD is not None and here_BT.any():
                hidden_BTD = hidden_BTD.clone()
                hidden_BTD[here_BT] = check.jump(hidden_BTD[here_BT])
        return hidden_BTD

    def jump(self, hidden_ND: Tensor) -> Tensor:
        """Where the last block would bring these states, as far as a linear map knows."""
        if self.jump_DD is None or self.jump_D is None:
            return hidden_ND
        jumped: Tensor = nn.functional.linear(hidden_ND, self.jump_DD, self.jump_D)
        return jumped

    def confidence(self, hidden_ND: Tensor) -> Tensor:
        """How sure each token is, from 0 to 1."""
        if self.predictor is not None:
            sure: Tensor = (-self.predictor(hidden_ND)).exp()
            return sure
        return readings(self._read, self.jump(hidden_ND))[0]


def readings(read: Sequence[nn.Module], hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Largest probability, and its token, for states after the last block.

    What a family does to its logits afterwards (Gemma's soft cap, Cohere's scale) is not done: it keeps their order.
    """
    sure, tokens = [], []
    width = getattr(read[-1], "out_features", LOGITS_AT_ONCE)
    assert isinstance(width, int)
    for hidden_KD in torch.split(hidden_ND, max(1, LOGITS_AT_ONCE // width)):
        logits_KV = logits_of(read, hidden_KD)
        most = logits_KV.max(-1)
        sure.append((most.values - logits_KV.logsumexp(-1)).exp())
        tokens.append(most.indices)
    return torch.cat(sure), torch.cat(tokens)


def logits_of(read: Sequence[nn.Module], hidden_ND: Tensor) -> Tensor:
    """N×V in float32, for states after the last block."""
    state = hidden_ND[None]
    for module in read:
        state = module(state)
    logits_NV: Tensor = state[0].float()
    return logits_NV
