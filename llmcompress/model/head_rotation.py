"""Rotates the values of every attention head: one linear writes them, another reads them. H = head size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.model.attention import Attention, find_attentions
from llmcompress.model.map import BlockStructure, ModelMap
from llmcompress.model.residual import refused
from llmcompress.model.rotation import few_tokens, logits_of
from llmcompress.model.site import LinearSite

Basis = Callable[[int], Tensor]
"""Size of a head → orthonormal matrix, float64."""


@torch.no_grad()
def rotate_heads(model: PreTrainedModel, model_map: ModelMap, sites: Sequence[LinearSite], basis: Basis) -> set[str]:
    """Rotate the values of all heads whose linears are ordinary ones; the names of the blocks where that was done.

    Heads that share their values share the basis. Attention weighs values and adds them, so any basis is exact; the
    logits must not move, which is the proof that nothing else happens between the two linears.

    Raises: CompressError when the logits moved; the model is spoiled then.
    """
    before = logits_of(model, few_tokens(model))
    by_name = {site.name: site for site in sites}
    known: dict[BlockStructure, list[Attention]] = {}
    rotated = set()
    for info in model_map.blocks:
        if info.structure not in known:
            known[info.structure] = find_attentions(model, info.index, info.structure)
        for attention in known[info.structure]:
            linears = {
                name: by_name[info.full(name)] for name in (attention.reader, *(tap for tap, _ in attention.taps))
            }
            if not any(site.is_compressed for site in linears.values()):
                _rotate(attention, linears, basis)
                rotated.add(info.name)
    moved = (logits_of(model, few_tokens(model)) - before).abs().max()
    if not moved <= 1e-3 * before.abs().max():
        raise refused("the attention changes the values between the heads and the output projection", "rotation.heads")
    return rotated


def _rotate(attention: Attention, linears: dict[str, LinearSite], basis: Basis) -> None:
    reader = linears[attention.reader]
    columns_OI = reader.weight_OI.double()
    rows = {name: (linears[name].weight_OI.double(), linears[name].bias_O) for name, _ in attention.taps}
    touched = set()
    for group in attention.groups:
        matrix_HH = basis(len(group.values)).to(columns_OI.device)
        places = [attention.channels.locate(channel) for channel in group.values]
        names = {name for name, _ in places}
        assert len(names) == 1, "the values of a head come from one linear"
        name = names.pop()
        touched.add(name)
        numbers = [row for _, row in places]
        weight_OI, bias_O = rows[name]
        weight_OI[numbers] = matrix_HH @ weight_OI[numbers]
        if bias_O is not None:
            bias_O[numbers] = (matrix_HH @ bias_O[numbers].double()).to(bias_O.dtype)
        for head in group.heads:
            columns_OI[:, list(head)] = columns_OI[:, list(head)] @ matrix_HH.T
    reader.write(columns_OI.float())
    for name in touched:
        weight_OI, bias_O = rows[name]
        linears[name].write(weight_OI.float())
        if bias_O is not None:
            linears[name].write_bias(bias_O)
