"""Changes the basis of the residual stream, and reduces its width. D = width of the stream, W = another width.

Works on the live model's parameters, wherever they are, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.model.block_experiment import LINEARS
from llmcompress.model.norms import gain_and_bias
from llmcompress.model.residual import Port, Ports, Residual, StreamNorm, refused
from llmcompress.modules.base import CompressedModule
from llmcompress.numerics.basis import mirror_normal, reflected

Constants = Literal["bias", "mean"]
"""Where the bias of a norm goes when its reader has none: into a new bias of the reader; or into the direction of all
ones, which a centred norm never gives: the norm's bias becomes 1 everywhere, and the reader's mean the constant."""

_SIZES: dict[tuple[str, int], str] = {
    ("Linear", 0): "out_features",
    ("Linear", 1): "in_features",
    ("Conv1D", 0): "nx",
    ("Conv1D", 1): "nf",
    ("Embedding", 1): "embedding_dim",
}
"""Under which names modules note the sizes of their weight's axes; others note what they like."""


@torch.no_grad()
def make_rotatable(
    model: PreTrainedModel, residual: Residual, *, constants: Constants, generator: torch.Generator
) -> None:
    """Prepare the model so that its residual stream can have any basis, and check it with a reflection.

    Gains and biases of norms are folded into their readers; where norms subtract the mean, writers of the stream are
    centred; a tied head is untied. The stream is reflected at a random plane, and the logits must not change: this
    proves that every reader and writer is known.

    Raises: CompressError if the logits changed; the model is then unusable.
    """
    ids_BT = few_tokens(model)
    before = logits_of(model, ids_BT)
    untie(model)
    normal_D = mirror_normal(residual.width, generator)
    for prefix, ports in places(residual):
        for norm in ports.norms:
            _fold_norm(model, prefix, norm, normal_D, constants=constants)
        for writer in ports.writers:
            _change(model, prefix, writer.port, lambda rows: reflected(_centred(rows, residual.centred), normal_D))
    moved = (logits_of(model, ids_BT) - before).abs().max()
    # rounding moves them by 1e-6 of the largest, a missed reader by a tenth
    if not moved <= 1e-3 * before.abs().max():
        raise refused(
            "a module reads or writes the residual stream in a way that could not be identified", type(model).__name__
        )


def places(residual: Residual) -> list[tuple[str, Ports]]:
    """What stands around the blocks, then the blocks; with the prefix of the ports' names."""
    return [("", residual.outside_blocks), *((f"{name}.", ports) for name, ports in residual.blocks)]


def untie(model: PreTrainedModel) -> None:
    """Give the head a weight of its own; config.json says so."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    for noted in (model.config, model.config.get_text_config(), model):
        if getattr(noted, "tie_word_embeddings", False):
            noted.tie_word_embeddings = False


@torch.no_grad()
def contract(model: nn.Module, name: str, axis: int, matrix_DW: Tensor) -> None:
    """Multiply a parameter by a matrix along the axis that meets the stream; its owner notes the new size."""
    parameter = model.get_parameter(name)
    matrix_DW = matrix_DW.float()
    # where the matrix is: weights may wait on the CPU for a device that multiplies faster
    rows = parameter.detach().to(matrix_DW.device, torch.float32).movedim(axis, -1)
    value = (rows @ matrix_DW).movedim(-1, axis).to(parameter.device).contiguous()
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
    if value.dim() < 2:
        return
    before, width = matrix_DW.shape
    noted = [size for kind in type(owner).__mro__ if (size := _SIZES.get((kind.__name__, axis)))]
    if not noted:  # routers and banks of experts
        noted = [key for key, number in vars(owner).items() if type(number) is int and number == before]
    for size in noted:
        setattr(owner, size, width)
        # a factored linear notes the sizes of its outer factors
        for outer in _factored_parents(model, owner_name):
            setattr(outer, size, width)


def _factored_parents(model: nn.Module, name: str) -> Iterator[CompressedModule]:
    while name := name.rpartition(".")[0]:
        module = model.get_submodule(name)
        if not isinstance(module, CompressedModule) or module.wraps_original:
            return
        yield module


@torch.no_grad()
def readers_gram(model: nn.Module, prefix: str, norm: StreamNorm, device: torch.device) -> Tensor:
    """D×D, float64: sum of WᵀW over all that reads what the norm gives."""
    total: Tensor | float = 0.0
    for port in norm.readers:
        weight = model.get_parameter(prefix + port.parameter).detach().movedim(port.axis, -1)
        rows = weight.reshape(-1, weight.shape[-1]).to(device, torch.float32)
        total = total + (rows.T @ rows).double()
    assert isinstance(total, Tensor)
    return total


def resize_norm(norm: nn.Module, before: int, width: int) -> None:
    """A norm whose channels are all alike, made for another width."""
    for key, parameter in list(norm.named_parameters(recurse=False)):
        setattr(norm, key, nn.Parameter(parameter.detach()[:1].repeat(width), requires_grad=False))
    for key, value in list(vars(norm).items()):
        if type(value) in (int, tuple) and value in (before, (before,)):
            setattr(norm, key, (width,) if isinstance(value, tuple) else width)


def _fold_norm(
    model: PreTrainedModel, prefix: str, norm: StreamNorm, normal_D: Tensor, *, constants: Constants
) -> None:
    """Gain and bias go into the readers; the norm is left with gain 1, and bias 0 or 1."""
    module = model.get_submodule(prefix + norm.name)
    gain_D, bias_D = gain_and_bias(module, norm.form, len(normal_D))
    carried = False
    for port in norm.readers:
        weight = model.get_parameter(prefix + port.parameter).movedim(port.axis, -1)
        constant = weight.double() @ bias_D.to(weight.device)
        alone = bool(bias_D.any()) and not _add_bias(model, prefix, port, constant, create=constants == "bias")
        carried |= alone

        def change(rows: Tensor, constant: Tensor = constant, alone: bool = alone) -> Tensor:
            rows = reflected(_centred(rows * gain_D.to(rows.device), norm.form.centred), normal_D.to(rows.device))
            return rows + constant.reshape(-1, 1) / rows.shape[1] if alone else rows

        _change(model, prefix, port, change)
    if carried and not norm.form.centred:
        raise refused(
            "the bias of this norm, which keeps the mean, cannot be folded into any linear", prefix + norm.name
        )
    for key, parameter in module.named_parameters(recurse=False):
        parameter.data.fill_(1 - norm.form.offset if key == "weight" else float(carried))


def _add_bias(model: nn.Module, prefix: str, port: Port, constant: Tensor, *, create: bool) -> bool:
    """Add to the bias of the reader, if it has or may get one."""
    owner = model.get_submodule(prefix + port.owner)
    if not isinstance(owner, LINEARS) or (owner.bias is None and not create):
        return False
    bias = owner.weight.new_zeros(len(constant)) if owner.bias is None else owner.bias.detach()
    owner.bias = nn.Parameter(bias + constant.to(bias.dtype), requires_grad=False)
    return True


def _change(model: nn.Module, prefix: str, port: Port, change: Callable[[Tensor], Tensor]) -> None:
    """Rewrite a parameter whose rows (all other axes flattened) run along the stream."""
    parameter = model.get_parameter(prefix + port.parameter)
    moved = parameter.detach().movedim(port.axis, -1)
    rows = change(moved.reshape(-1, moved.shape[-1]).double())
    parameter.data.copy_(rows.reshape(moved.shape).movedim(-1, port.axis))


def _centred(rows: Tensor, centred: bool) -> Tensor:
    return rows - rows.mean(-1, keepdim=True) if centred else rows


def few_tokens(model: PreTrainedModel) -> Tensor:
    """Two short sequences of random tokens, on the CPU."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (2, 8), generator=generator)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """What the model computes for them."""
    device = model.get_input_embeddings().weight.device
    logits: Tensor = model(input_ids=ids_BT.to(device), use_cache=False).logits
    return logits
