"""How much every block changes its input. L = blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmcompress.calibration.whole import WholeModel
from llmcompress.model.skeleton import HIDDEN_KEYWORD


@torch.no_grad()
def block_influence(whole: WholeModel) -> Tensor:
    """One minus the mean cosine of what enters a block and what leaves it, over all calibration tokens.

    Source: Men et al., arXiv 2403.03853 (ShortGPT), section 3.1.
    """
    cosines: list[list[Tensor]] = []
    with ExitStack() as hooks:
        for block in whole.stream():
            cosines.append(hooks.enter_context(_cosines(block.module)))
            if len(cosines) == len(whole.map.blocks):
                block.outputs()  # the stream itself runs all but the last one
            whole.context.progress.note(f"influence of block {len(cosines)} of {len(whole.map.blocks)}")
    return torch.stack([1 - torch.cat(of_block).double().mean() for of_block in cosines])


@contextmanager
def _cosines(block: nn.Module) -> Iterator[list[Tensor]]:
    """One number per token for every forward of the block."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = kwargs[HIDDEN_KEYWORD] if HIDDEN_KEYWORD in kwargs else args[0]
        after = output if isinstance(output, Tensor) else output[0]
        found.append(functional.cosine_similarity(before, after, dim=-1).flatten().cpu())

    handle = block.register_forward_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
