"""Transformers in this process, dense or compressed: the reference for all other runtimes."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from typing_extensions import override

from llmcompress.calibration.offloading import WeightStore
from llmcompress.calibration.tokens import max_positions
from llmcompress.loading.borrowed import is_loaded_quantized
from llmcompress.loading.load import load
from llmcompress.loading.quiet import quiet_transformers
from llmcompress.modules.cache_names import cache_argument, cache_of, with_cache
from llmcompress.runners.base import RUNNERS, Runner
from llmcompress.runners.work import WeightsRead, Work, cache_bytes, flop_counter


@RUNNERS.register("torch")
class TorchRunner(Runner):
    """A live model, in eval mode while the runner is open. Logits have the dtype that the model computes in.

    With `weights_at` the model runs on `device` in float32, and its weights return to where they were afterwards.
    Otherwise it is used where and as it is.
    """

    name = "torch"

    def __init__(
        self, model: PreTrainedModel, *, weights_at: WeightStore | None = None, device: torch.device | str | None = None
    ) -> None:
        self._undo = ExitStack()
        self._model = model
        self._undo.callback(model.train, model.training)
        model.eval()
        self.device = model.get_input_embeddings().weight.device if device is None else torch.device(device)
        if weights_at is not None:
            self._undo.enter_context(weights_at.running(model, self.device))
        self.vocabulary = model.config.get_text_config().vocab_size
        self.max_positions = max_positions(model.config)

    @classmethod
    @override
    def open(cls, model: str, *, device: torch.device, dtype: torch.dtype) -> Self:
        loaded = load(model, dtype=dtype, device=device).model
        if is_loaded_quantized(loaded):  # its codes become weights in the first forward, under a progress bar
            with quiet_transformers(), torch.inference_mode():
                loaded(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
        return cls(loaded, device=device)

    @override
    @torch.inference_mode()
    def logits(self, ids_BT: Tensor) -> Tensor:
        found: Tensor = self._model(input_ids=ids_BT.to(self.device), use_cache=False).logits
        return found

    @override
    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[list[int]]:
        padding = min(stop, default=0)
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(stop) or None, pad_token_id=padding
        )
        ids_BT, mask_BT = _padded_left(prompts, padding)
        with _generating_by(self._model, settings):
            out_BT = self._model.generate(ids_BT.to(self.device), attention_mask=mask_BT.to(self.device))
        return [_until(stop, new) for new in out_BT[:, ids_BT.shape[1] :].tolist()]

    @override
    @torch.inference_mode()
    def stream(self, ids_BT: Tensor, *, max_new_tokens: int) -> Iterator[Tensor]:
        argument, last_only = cache_argument(self._model.forward), self._last_only()
        ids_BT = fed_BT = ids_BT.to(self.device)
        cache: dict[str, Any] = {}
        for step in range(max_new_tokens):
            out: Any = self._model(input_ids=fed_BT, **cache, **last_only, use_cache=True)
            new_B1 = out.logits[:, -1:].argmax(-1)
            yield new_B1[:, 0]
            if argument and (filled := cache_of(out)) is not None:
                cache, fed_BT = {argument: filled}, new_B1
            elif step + 1 < max_new_tokens:  # a model without a cache reads its whole text again
                ids_BT = fed_BT = torch.cat([ids_BT, new_B1], dim=1)

    @override
    @torch.no_grad()  # in inference mode, torch hides what its compound operations consist of
    def work(self, ids_BT: Tensor) -> Work:
        ids_BT, last_only = ids_BT.to(self.device), self._last_only()
        with flop_counter() as counter:
            out: Any = self._model(input_ids=ids_BT, **last_only, use_cache=True)
        cache = cache_of(out)
        prompt_bytes = cache_bytes(cache)
        with WeightsRead(self._model) as read:
            new_B1 = out.logits[:, -1:].argmax(-1)
            self._model(input_ids=new_B1, **with_cache(self._model.forward, cache), **last_only, use_cache=True)
        return Work(counter.get_total_flops(), read.bytes, prompt_bytes)

    def _last_only(self) -> dict[str, int]:
        """The argument with which a forward computes the logits of the last position alone, if it has one."""
        return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self._model.forward).parameters else {}

    @override
    @torch.inference_mode()
    def first_not_finite(self, ids_BT: Tensor) -> str | None:
        found: list[str] = []
        with ExitStack() as undo:
            for name, module in self._model.named_modules():
                if name:
                    undo.callback(module.register_forward_hook(partial(_note_not_finite, found, name)).remove)
            self.logits(ids_BT)
        return found[0] if found else None

    @override
    def torch_module(self) -> nn.Module:
        module: nn.Module = self._model
        return module

    @override
    def close(self) -> None:
        self._undo.close()


def _padded_left(prompts: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Prompts that all end at the last column, and a mask that is 0 on what stands before them."""
    longest = max(map(len, prompts))
    gaps = [longest - len(prompt) for prompt in prompts]
    ids_BT = torch.tensor([[padding] * gap + list(prompt) for gap, prompt in zip(gaps, prompts, strict=True)])
    mask_BT = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
    return ids_BT, mask_BT


@contextmanager
def _generating_by(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """The model's own settings aside: transformers would use them wherever ours are silent."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def _until(stop: Collection[int], new: list[int]) -> list[int]:
    end = next((place for place, token in enumerate(new) if token in stop), len(new))
    return new[:end]


def _note_not_finite(found: list[str], name: str, module: nn.Module, args: Any, output: Any) -> None:
    """Modules finish from the inside out, so the first one noted is the innermost."""
    tensors = output if isinstance(output, tuple | list) else [output]
    if not found and any(isinstance(each, Tensor) and not each.isfinite().all() for each in tensors):
        found.append(name)
