"""States and predictions that dynamic inference measures on calibration text: the hidden state before every block, and
its logits.

B = sequences, T = tokens, D = hidden size, N = tokens of all sequences, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmcompress.calibration.whole import WholeModel
from llmcompress.model.readout import watching
from llmcompress.model.skeleton import find_blocks
from llmcompress.modules.dynamic import DynamicBlock, tallied
from llmcompress.modules.dynamic_exit import LOGITS_AT_ONCE, logits_of
from llmcompress.records.rows import SiteReport


def states_at(whole: WholeModel, model: PreTrainedModel, indices: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Run the model over the calibration batches; per batch the states before these blocks (last + 1: behind all)."""
    states: dict[int, Tensor] = {}

    def see(index: int, state_ND: Tensor) -> None:
        if index in indices:
            states[index] = state_ND

    with watching(model, see):
        for ids_BT in whole.batches():
            model.base_model(input_ids=ids_BT, use_cache=False)
            yield states


def divergence(read: Sequence[nn.Module], final_ND: Tensor, here_ND: Tensor) -> Tensor:
    """KL divergence in nats of the prediction read off `here_ND` from the one read off `final_ND`, token by token."""
    found = []
    width = getattr(read[-1], "out_features", LOGITS_AT_ONCE)
    pieces = max(1, LOGITS_AT_ONCE // width)
    for final_KD, here_KD in zip(torch.split(final_ND, pieces), torch.split(here_ND, pieces), strict=True):
        wanted_KV, given_KV = (logits_of(read, state_KD).log_softmax(-1) for state_KD in (final_KD, here_KD))
        found.append(functional.kl_div(given_KV, wanted_KV, reduction="none", log_target=True).sum(-1))
    return torch.cat(found)


def put_around(model: PreTrainedModel, wrappers: Mapping[int, DynamicBlock]) -> None:
    """Put a wrapper around each block with such an index, and let all find what they need of the model."""
    for index, (name, block) in enumerate(find_blocks(model)):
        if index in wrappers:
            wrapper = wrappers[index]
            wrapper.to(next(block.parameters()).device).take(block)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, wrapper.train(block.training))
    for wrapper in wrappers.values():
        wrapper.connect(model)


def measured(
    whole: WholeModel, model: PreTrainedModel, names: Sequence[str], algorithm: str, threshold: float
) -> list[SiteReport]:
    """What the finished model runs on the calibration text, the effect of earlier skips on later tokens included."""
    with tallied(model) as counts:
        for ids_BT in whole.batches():
            model.base_model(input_ids=ids_BT, use_cache=False)
    tokens = whole.context.windows_NT.numel()
    return [
        SiteReport(site=name, algorithm=algorithm, score=threshold, active=counts[name].share, tokens=tokens)
        for name in names
    ]
