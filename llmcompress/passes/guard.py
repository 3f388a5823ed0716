"""Every block that passes leave is compared with its plain baseline, on windows that no pass measured.

N = windows, T = tokens, H = hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmcompress.calibration.held_out import HeldOutStream
from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.passes.base import PASSES, BlockPass, Pass
from llmcompress.records.rows import SiteReport

MARGIN = 1.05
"""A block falls back where its error is more than this many times that of the baseline: differences below are noise of
a few hundred tokens."""


class _Plain(NamedTuple):
    """A block after the baseline."""

    module: nn.Module
    rows: list[SiteReport]
    output_NTH: Tensor


class Guard:
    """One stage's blocks against the same blocks after `rtn` or `magnitude` with the same schemes and shares.

    Both are given what the compressed blocks before make of the held-out windows, and are to give what the block gave
    in the model as the stage found it. A block that errs more than its baseline is replaced by it.
    """

    def __init__(self, whole: WholeModel, passes: Sequence[BlockPass], plain: Sequence[BlockPass]) -> None:
        assert whole.context.held_out_NT is not None
        self._context, self._plain = whole.context, plain
        self._names, self._plain_names = _names(passes), _names(plain)
        self._stream = HeldOutStream(whole.model, whole.context, whole.context.held_out_NT)

    @classmethod
    def of(cls, whole: WholeModel, passes: Sequence[BlockPass], decisions: Mapping[str, Tensor]) -> Guard | None:
        """None where no held-out windows are given, or nothing plain stands against these passes."""
        if whole.context.held_out_NT is None:
            return None
        plain = plain_passes(passes, decisions)
        return cls(whole, passes, plain) if plain else None

    def begin(self, block: BlockWork) -> None:
        """Before anything is done to the block: what it is to give."""
        self._stream.dense_NTH = self._stream.through(block.info, block.module, self._stream.dense_NTH)

    def baseline(self, block: BlockWork) -> _Plain:
        """A copy of the block after the plain passes; the block itself stays as it is."""
        # buffers are cloned one by one: a copy of the storage behind them would take what they share with others along
        cloned = {id(buffer): buffer.clone() for buffer in block.module.buffers()}
        twin = BlockWork(block.info, copy.deepcopy(block.module, cloned), (), (), self._context)
        rows = [row for each in self._plain for row in each.run(twin)]
        twin.round_to_storage_dtype()
        return _Plain(twin.module, rows, self._stream.through(block.info, twin.module, self._stream.now_NTH))

    def judge(self, block: BlockWork, rows: list[SiteReport], plain: _Plain) -> list[SiteReport]:
        """The rows of what stays: those of the passes, or of the baseline where the block fell back to it."""
        output_NTH = self._stream.through(block.info, block.module, self._stream.now_NTH)
        error, plain_error = (stream_error(each, self._stream.dense_NTH) for each in (output_NTH, plain.output_NTH))
        if self._context.processes.broadcast(not error <= MARGIN * plain_error):
            _take_parts(block.module, plain.module)
            self._context.progress.note(
                f"{block.info.name}: {self._names} left its output {error:.3g} off on held-out text, "
                f"{self._plain_names} {plain_error:.3g}: replaced by {self._plain_names}"
            )
            why = f"{self._names} was worse on held-out text: replaced by {self._plain_names}"
            times = error / plain_error if plain_error else None
            rows = [row.model_copy(update={"degraded": why, "score": times}) for row in plain.rows]
            output_NTH = plain.output_NTH
        self._stream.now_NTH = output_NTH
        return rows

    def restored(self, block: BlockWork) -> None:
        """The block was finished by an earlier run."""
        self._stream.now_NTH = self._stream.through(block.info, block.module, self._stream.now_NTH)


def plain_passes(passes: Sequence[BlockPass], decisions: Mapping[str, Tensor]) -> list[BlockPass]:
    """What stands against these passes, which decided so; empty where they are plain, or one has no baseline."""
    fixed: list[Pass | None] = [each.with_decisions(decisions) if each.decides else each for each in passes]
    plain: list[BlockPass] = []
    for each in fixed:
        found = each.plain() if isinstance(each, BlockPass) and each.traits() else () if each else None
        if found is None or any(baseline.needs() for baseline in found):
            return []
        plain += found
    return [] if plain == fixed else plain


def stream_error(found_NTH: Tensor, wanted_NTH: Tensor) -> float:
    """Squared distance ÷ squared length, mean over tokens: the few that are thousands of times longer count as one.

    Infinite where it is not a number.
    """
    length_NT = wanted_NTH.square().sum(-1)
    relative_NT = (found_NTH - wanted_NTH).square().sum(-1) / length_NT.clamp_min(torch.finfo(torch.float32).tiny)
    error = float(relative_NT.mean(dtype=torch.float64))
    return error if error == error else float("inf")


def _names(passes: Sequence[BlockPass]) -> str:
    return " → ".join(PASSES.name_of(type(each)) for each in passes)


def _take_parts(module: nn.Module, other: nn.Module) -> None:
    """All parts of another module of the same kind, in the module that stays where it stands."""
    for own, theirs in (
        (module._modules, other._modules),
        (module._parameters, other._parameters),
        (module._buffers, other._buffers),
    ):
        own.clear()
        own.update(theirs)  # type: ignore[arg-type]
