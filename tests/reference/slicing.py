"""Slicing a residual stream the slow and obvious way: a mask in the full width, and parameters counted one by one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.model.residual import Residual
from llmcompress.model.rotation import places


@torch.no_grad()
def project_what_is_written(model: PreTrainedModel, residual: Residual, kept_DK: Tensor) -> None:
    """Nothing gets smaller, but all that is written loses what lies in other directions; norms divide by all of D."""
    projection_DD = (kept_DK @ kept_DK.T).float()
    for prefix, ports in places(residual):
        for writer in ports.writers:
            parameter = model.get_parameter(prefix + writer.port.parameter)
            parameter.copy_((parameter.movedim(writer.port.axis, -1) @ projection_DD).movedim(-1, writer.port.axis))


def parameters(model: nn.Module) -> int:
    """All of them, counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def opt_with_shortcuts(*, vocabulary: int, positions: int, width: int, kept: int, ffn: int, layers: int) -> int:
    """Parameters of an OPT model after the paper's slicing: 147,250,880 for OPT-125M at 20 %, as its program reports.

    The head is a matrix of its own and gets a bias from the last norm; norms have no parameters; the last block gives
    all directions.
    """
    embeddings = (vocabulary + positions + 2) * kept
    head = vocabulary * width + vocabulary
    attention = 3 * (kept * width + width) + (width * kept + kept)
    feed_forward = (kept * ffn + ffn) + (ffn * kept + kept)
    shortcuts = 2 * kept * kept
    last = (width - kept) * (ffn + 1) + kept * (width - kept)
    return embeddings + head + layers * (attention + feed_forward + shortcuts) + last
