"""Borrows a user's model: in float32 on the CPU and in eval mode while we compute, then restored to its device, dtype
and mode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.errors import CompressError, note_saved
from llmcompress.progress import LOG

_ANY_DTYPE = ("eager", "sdpa")
"""Implementations of attention that compute in float32 on every device; flash attention does not."""


@dataclass(frozen=True)
class Place:
    """The original device, dtype and mode of a model."""

    device: torch.device
    dtypes: dict[str, torch.dtype]
    """Of its floating-point parameters and of the buffers that are saved with them."""
    wants_gradient: frozenset[str]
    training: bool
    attention: str

    @property
    def usual_dtype(self) -> torch.dtype:
        """Of most of them; for what stands under another name now, as experts that were taken apart."""
        return Counter(self.dtypes.values()).most_common(1)[0][0]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Place:
        """Before it is taken."""
        return cls(
            model.device,
            {name: tensor.dtype for name, tensor, _ in _numbers(model)},
            frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad),
            model.training,
            str(model.config._attn_implementation),
        )


def take(model: PreTrainedModel) -> Place:
    """Bring it to where and how runs compute; a float32 model on the CPU, or one with codes, only changes its mode.

    Gradients that are left in parameters are dropped where the dtype or the device changes.
    """
    place = Place.of(model)
    model.eval()
    if is_loaded_quantized(model):
        return place
    if place.attention not in _ANY_DTYPE:
        model.set_attn_implementation("sdpa")
    model.to(torch.device("cpu"))
    _cast(model, lambda _: torch.float32)
    return place


def give_back(model: PreTrainedModel, place: Place, dtype: torch.dtype | None = None) -> bool:
    """Bring it, or what a run made of it, to its place again; whether its numbers have the dtype they had.

    `dtype` is what a run rounded its values to; None: nothing was changed. Where some would lose by it, all stay in
    float32: the transforms of some passes are computed in more digits than weights are stored in.
    """
    if is_loaded_quantized(model):
        model.train(place.training)
        return True
    survives = dtype is None or all(torch.equal(each.to(dtype).to(each.dtype), each) for _, each, _ in _numbers(model))
    if survives:
        _cast(model, lambda name: dtype or place.dtypes.get(name, place.usual_dtype))
    if place.device.type != "cpu":
        model.to(place.device)
    if place.attention not in _ANY_DTYPE:
        model.set_attn_implementation(place.attention)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in place.wants_gradient and parameter.is_floating_point())
    model.train(place.training)
    return survives


def is_loaded_quantized(model: PreTrainedModel) -> bool:
    """Whether transformers loaded it quantized: such a model is run where and as it is."""
    return getattr(model, "hf_quantizer", None) is not None


@contextmanager
def borrowed(model: PreTrainedModel) -> Iterator[None]:
    """Borrow the model for a measurement."""
    place = take(model)
    try:
        yield
    finally:
        give_back(model, place)


@contextmanager
def lent(model: PreTrainedModel | None) -> Iterator[Callable[[PreTrainedModel, torch.dtype], None]]:
    """For as long as a run lasts; gives the function that brings what the run made to the place of the model.

    After an error the model itself is brought back. None: there is nothing of the user's, and all stays as it is.
    """
    if model is None:
        yield lambda made, dtype: None
        return
    place = take(model)

    def done(made: PreTrainedModel, dtype: torch.dtype) -> None:
        if not give_back(made, place, dtype):
            LOG.warning("the model stays in float32: some of its transforms need more digits than its weights had")

    try:
        yield done
    except BaseException:
        give_back(model, place)
        raise


@contextmanager
def told_if_changed(in_memory: bool) -> Iterator[None]:
    """Adds to an error during compression that the model in memory is partly changed."""
    try:
        yield
    except BaseException as error:
        told = "the model in memory is changed in part: load it again before the next attempt"
        if in_memory and isinstance(error, CompressError):
            error.fix = f"{error.fix}; {told}" if error.fix else told
        elif in_memory:
            note_saved(error, f"nothing; {told}")
        raise


def _numbers(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """Full name, tensor and owner of every floating-point number that is saved; not of tables that are computed."""
    for prefix, module in model.named_modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not tensor.is_floating_point() or tensor.itemsize == 1:  # one byte: codes
                continue
            if leaf in module._non_persistent_buffers_set:
                continue
            yield f"{prefix}.{leaf}" if prefix else leaf, tensor, module


@torch.no_grad()
def _cast(model: nn.Module, dtype_of: Callable[[str], torch.dtype]) -> None:
    for name, tensor, owner in list(_numbers(model)):
        wanted = dtype_of(name)
        if tensor.dtype == wanted:
            continue
        if isinstance(tensor, nn.Parameter):
            tensor.grad = None
            tensor.data = tensor.data.to(wanted)  # the parameter itself stays: what is tied stays tied
        else:
            owner._buffers[name.rpartition(".")[2]] = tensor.to(wanted)
