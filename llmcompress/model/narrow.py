"""Narrows the residual stream to some directions of one basis: an ordinary smaller model.

D = width of the stream, W = its new width, K = kept directions: W, or W - 1 where norms subtract the mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.model.residual import Residual
from llmcompress.model.rotation import contract, few_tokens, places, resize_norm
from llmcompress.model.skeleton import find_blocks, record
from llmcompress.model.stock import meta_model
from llmcompress.modules.plain_attributes import plain_attributes
from llmcompress.numerics.basis import zero_mean_frame


@torch.no_grad()
def narrow(model: PreTrainedModel, residual: Residual, kept_DK: Tensor, readers_DK: Mapping[str, Tensor]) -> None:
    """Slice a model that `make_rotatable` prepared; its norms stay what they are, over fewer channels.

    The kept directions are orthonormal, without a mean where norms subtract it; `readers_DK` has for some norms (by
    full name) another matrix that their readers use in place of the directions themselves.

    What is written is multiplied by √(W/D) and what reads by √(D/W), so that a stock norm, which divides by its own
    width, divides as if by D. That equals a gain of √(D/W) with an epsilon of D/W times the old one, but leaves gains 1
    and epsilons alone: norms inside attention share the epsilon of the config.
    """
    width = kept_DK.shape[1] + int(residual.centred)
    ratio = math.sqrt(residual.width / width)
    _rescale_by_width(model, residual.width, width)
    write_DW = _placed(kept_DK / ratio, residual, mean=0.0)
    for prefix, ports in places(residual):
        for norm in ports.norms:
            read_DW = _placed(readers_DK.get(prefix + norm.name, kept_DK) * ratio, residual, mean=1.0)
            for port in norm.readers:
                contract(model, prefix + port.parameter, port.axis, read_DW)
            resize_norm(model.get_submodule(prefix + norm.name), residual.width, width)
        for writer in ports.writers:
            contract(model, prefix + writer.port.parameter, writer.port.axis, write_DW)


def _placed(kept_DK: Tensor, residual: Residual, *, mean: float) -> Tensor:
    """The directions as columns of D×W: as they are, or inside the W-1 dimensions without a mean.

    With `mean` 1 a constant that a reader keeps in the mean of its rows stays one.
    """
    if not residual.centred:
        return kept_DK
    width = kept_DK.shape[1] + 1
    return kept_DK @ zero_mean_frame(width).to(kept_DK) + mean / width


def _rescale_by_width(model: PreTrainedModel, before: int, width: int) -> None:
    """Where embeddings are multiplied by √D, as in Gemma, they will be by √W: the table compensates for it."""
    ids_BT = few_tokens(model)
    blocks = find_blocks(model)
    embedding = model.get_input_embeddings()
    entering = record(model, blocks, ids_BT).hidden
    rows = embedding.weight[ids_BT.to(embedding.weight.device)]
    if rows.shape != entering.shape or not torch.allclose(entering, rows * math.sqrt(before), rtol=1e-3):
        return
    for key, value in list(vars(embedding).items()):
        if isinstance(value, float) and math.isclose(value, math.sqrt(before), rel_tol=1e-3):
            setattr(embedding, key, math.sqrt(width))
    for _, buffer in embedding.named_buffers(recurse=False):
        if buffer.numel() == 1 and math.isclose(float(buffer), math.sqrt(before), rel_tol=1e-2):
            buffer.fill_(math.sqrt(width))
    model.config.get_text_config().hidden_size = width
    for name, stock in meta_model(type(model), model.config).named_modules():
        live = model.get_submodule(name)
        for key, value in plain_attributes(stock).items():
            if value == width and vars(live).get(key) == before:
                setattr(live, key, width)
    embedding.weight.data.mul_(math.sqrt(before / width))
    near = 1e-3 * float(entering.abs().max())
    assert torch.allclose(record(model, blocks, ids_BT).hidden, entering, atol=near)
