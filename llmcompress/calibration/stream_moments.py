"""Second moments of the residual stream at every norm that reads it, from one forward pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.model.residual import Ports, Residual, StreamNorm
from llmcompress.numerics.basis import SecondMoment


def first_of_stages(ports: Ports) -> list[StreamNorm]:
    """One norm for every value of the stream that a block's norms read: those of one stage read the same."""
    stages = sorted({norm.stage for norm in ports.norms})
    return [next(norm for norm in ports.norms if norm.stage == stage) for stage in stages]


def stream_moments(whole: WholeModel, residual: Residual) -> dict[str, Tensor]:
    """Of the tokens at unit length, as norms see them: by the full names of all norms, the last one included.

    Norms of one stage have the very same tensor. Windows have no padding, so every row is a real token.
    Raises: CompressError when the stream is not finite.
    """
    moments: dict[str, SecondMoment] = {}

    def moment() -> SecondMoment:
        return SecondMoment(residual.width, whole.context.device)

    with ExitStack() as stack:
        for block, ports in residual.blocks:
            for reader in first_of_stages(ports):
                shared = moment()
                moments |= {f"{block}.{n.name}": shared for n in ports.norms if n.stage == reader.stage}
                module = whole.model.get_submodule(f"{block}.{reader.name}")
                stack.callback(module.register_forward_pre_hook(_shown_to(shared)).remove)
        last = moments[residual.outside_blocks.norms[0].name] = moment()
        for work in whole.stream():
            if work.info.index + 1 == len(residual.blocks):
                for hidden_BTD in work.outputs():
                    last.add(hidden_BTD.to(whole.context.device).flatten(0, -2))
            whole.context.progress.substep("slicegpt", done=work.info.index + 1, total=len(residual.blocks))
    return finite({name: found.sum_DD for name, found in moments.items()})


def finite(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, checked."""
    for name, sum_DD in moments.items():
        if not bool(sum_DD.diagonal().isfinite().all()):
            raise CompressError(
                "numerics.not-finite",
                "the model computes NaN or Inf on the calibration data",
                where=f"input of {name}",
                fix="check the checkpoint with a plain forward pass; try another calibration text",
            )
    return dict(moments)


def _shown_to(moment: SecondMoment) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def show(_: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        moment.add(x.flatten(0, -2))

    return show
