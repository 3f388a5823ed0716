"""What OpenVINO's graph can hold of a module: which expressions, and the matrices in them by name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmcompress.formats.openvino import fits
from llmcompress.modules.base import CompressedModule
from llmcompress.modules.expression import Chain, Expression, Gather, InputTransform, Opaque, OutputPlaces, Sum, Tied
from llmcompress.modules.expression_leaves import Dense, Leaf, Quantized
from llmcompress.modules.input_transforms import Selection

_COMBINED = (Chain, Sum, OutputPlaces, Gather, Tied)


def form_of(module: nn.Module, *, as_dense: bool) -> Expression | None:
    """What a linear, an embedding or a replaced module computes; None for any other module.

    `as_dense`: what the graph cannot hold becomes one ordinary matrix.
    """
    if isinstance(module, CompressedModule) and not module.is_transparent:
        form = module.expression()
        if as_dense and form.is_linear and not _is_held(form):
            whole = Dense(form.dense_weight())
            return Gather(whole) if isinstance(form, Gather) else whole
        return form
    if isinstance(module, nn.Embedding):
        return Gather(Dense(module.weight))
    if isinstance(module, Conv1D):
        return Dense(module.weight.T, bias=module.bias)
    return Dense(module.weight, bias=module.bias) if isinstance(module, nn.Linear) else None


def why_not(form: Expression) -> str | None:
    """Why the graph cannot hold it, as a clause after a module's name; None when it can."""
    for node in form.nodes():
        if isinstance(node, Opaque):
            return f"is more than a matrix: {node.reason}"
        if isinstance(node, InputTransform):
            if not isinstance(node.change, Selection):
                return f"changes its input ({type(node.change).__name__})"
        elif not isinstance(node, (*_COMBINED, Dense, Quantized)):
            return f"is stored as {type(node).__name__}"
    return None


def _is_held(form: Expression) -> bool:
    codes = (node.tensor for node in form.nodes() if isinstance(node, Quantized))
    return why_not(form) is None and all(fits(tensor.grid, tensor.shape[1]) for tensor in codes)


def matrices(form: Expression, module: str) -> Iterator[tuple[str, Leaf]]:
    """Its matrices in order, each with the name that it has in the graph; those of another module are left out."""
    leaves = [node for node in _own(form) if isinstance(node, Leaf)]
    for number, leaf in enumerate(leaves):
        yield f"{module}.weight" + (f".{number}" if len(leaves) > 1 else ""), leaf


def _own(form: Expression) -> Iterator[Expression]:
    if not isinstance(form, Tied):
        yield form
        for part in form.parts:
            yield from _own(part)
