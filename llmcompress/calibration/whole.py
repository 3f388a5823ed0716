"""The whole model, for passes that cannot work block by block. B = sequences, T = tokens, N = windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.stream import BlockStream, BlockWork
from llmcompress.model.map import ModelMap
from llmcompress.model.site import LinearSite
from llmcompress.model.skeleton import find_blocks
from llmcompress.numerics.loss import in_batches, next_token_loss


class WholeModel:
    """The live model, its map and its context; all calibration windows have the same length and no padding."""

    def __init__(self, model: PreTrainedModel, model_map: ModelMap, context: RunContext) -> None:
        self.model, self.map, self.context = model, model_map, context
        self.decisions: Mapping[str, Tensor] | None = None
        """What the pass that works now has decided about the model; None: it has not, or decides nothing."""

    def within(self, context: RunContext) -> WholeModel:
        """The same model seen by another run, which `replace` derived from this one's context."""
        return WholeModel(self.model, self.map, context)

    def stream(self, *, dense: bool = False) -> Iterator[BlockWork]:
        """Every block once, on the device and in float32; what the caller leaves in a block is fed onward.

        With `dense` each knows its `dense_outputs`.
        """
        return iter(BlockStream(self.model, self.map, self.context, dense=dense))

    def sites(self) -> list[LinearSite]:
        """All sites of all blocks, in model order."""
        modules, context = dict(find_blocks(self.model)), self.context
        return [
            LinearSite(
                info.full(site.name),
                site,
                modules[info.name],
                context.storage_dtype,
                zeros_are_masks=context.zeros_are_masks,
            )
            for info in self.map.blocks
            for site in info.structure.sites
        ]

    @contextmanager
    def resident(self) -> Iterator[PreTrainedModel]:
        """The whole model on the device in float32, in eval mode; back on the CPU afterwards.

        Gradients that were left in parameters are dropped, and which parameters wanted one is restored.

        Raises: CompressError when the weights are on disk because memory does not hold them.
        """
        self.context.weights_at.require_memory("a pass of this recipe")
        self.context.processes.require_one("a pass of this recipe")
        wanted = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        self.model.to(self.context.device, torch.float32)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.zero_grad(set_to_none=True)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(wanted.get(name, False))
            self.model.to("cpu")

    def batches(self, windows_NT: Tensor | None = None) -> Iterator[Tensor]:
        """B×T token ids on the device, of all windows or of these; as many at once as their logits allow."""
        windows_NT = self.context.windows_NT if windows_NT is None else windows_NT
        vocabulary = self.model.config.get_text_config().vocab_size
        for ids_BT in in_batches(windows_NT, self.context.batch, vocabulary):
            yield ids_BT.to(self.context.device)

    def loss(self, ids_BT: Tensor) -> Tensor:
        """Mean negative log-likelihood of the next token in nats; the model must be resident."""
        return next_token_loss(self.model(input_ids=ids_BT, use_cache=False).logits, ids_BT)

    def replace_model(self, model: PreTrainedModel) -> None:
        """The model was replaced by another object; it is mapped again after the pass."""
        self.model = model
