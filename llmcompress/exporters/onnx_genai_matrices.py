"""Which expression a node of the builder's graph computes: a whole linear, a part of one, or several side by side.

O = outputs, I = inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from llmcompress.exporters.onnx_genai_builder import Rows
from llmcompress.modules.expression import Chain, Expression, Sum
from llmcompress.modules.expression_leaves import Dense, Quantized
from llmcompress.numerics.quantized import QuantizedTensor

_PART = re.compile(r"(.+)\[(\d+):(\d+)\]")


@dataclass(frozen=True)
class Matrices:
    """The linears and the embedding of a model, by their names in it."""

    forms: Mapping[str, Expression]

    def name_of(self, rows: Sequence[Rows]) -> str:
        """What the outputs of a node are called in the file: the names of its linears, each with the outputs taken."""
        return "+".join(self._whole(each) or str(each) for each in rows)

    def form_called(self, name: str) -> Expression | None:
        """The expression of that name; None where its parts are of different kinds, so that no node computes them."""
        parts = [self._part(each) for each in name.split("+")]
        known = [each for each in parts if each is not None]
        if len(known) < len(parts):
            return None
        return known[0] if len(known) == 1 else _side_by_side(known)

    def linears_in(self, names: Iterable[str]) -> set[str]:
        """The modules that any of these names speaks of."""
        return {self._parsed(part).linear for name in names for part in name.split("+")}

    def _whole(self, rows: Rows) -> str | None:
        return rows.linear if (rows.start, rows.stop) == (0, self.forms[rows.linear].shape[0]) else None

    def _parsed(self, part: str) -> Rows:
        found = _PART.fullmatch(part)
        if found is None:
            return Rows(part, 0, self.forms[part].shape[0])
        return Rows(found[1], int(found[2]), int(found[3]))

    def _part(self, part: str) -> Expression | None:
        rows = self._parsed(part)
        form = self.forms[rows.linear]
        return form if self._whole(rows) else outputs_of(form, slice(rows.start, rows.stop))


def outputs_of(form: Expression, chosen: slice) -> Expression | None:
    """The same for some of its outputs; None where that is no expression of the same kind."""
    if isinstance(form, Quantized):
        return replace(form, tensor=form.tensor.rows(chosen), bias=None if form.bias is None else form.bias[chosen])
    if isinstance(form, Dense):
        return Dense(form.weight[chosen], bias=None if form.bias is None else form.bias[chosen])
    if isinstance(form, Chain):
        last = outputs_of(form.links[-1], chosen)
        return None if last is None else Chain((*form.links[:-1], last))
    if isinstance(form, Sum):
        terms = [outputs_of(term, chosen) for term in form.terms]
        return None if None in terms else Sum(tuple(term for term in terms if term is not None))
    return None


def _side_by_side(forms: Sequence[Expression]) -> Expression | None:
    """One matrix with the outputs of all: of codes on one grid, or of ordinary weights."""
    biased = [form for form in forms if form.dense_bias() is not None]
    bias_O = torch.cat([_bias(form) for form in forms]) if biased else None
    codes = [form for form in forms if isinstance(form, Quantized) and form.input_scale is None]
    if len(codes) == len(forms):
        kinds = {(form.tensor.grid, form.activations, form.tensor.shape[1]) for form in codes}
        return _one_table(codes, bias_O) if len(kinds) == 1 and not codes[0].tensor.grid.scales.single else None
    dense = [form for form in forms if isinstance(form, Dense)]
    return Dense(torch.cat([form.weight for form in dense]), bias=bias_O) if len(dense) == len(forms) else None


def _one_table(forms: Sequence[Quantized], bias_O: torch.Tensor | None) -> Quantized | None:
    tensors = [form.tensor for form in forms]
    if any(tensor.shared_scale is not None for tensor in tensors):
        return None
    zeros = [tensor.zero_point for tensor in tensors if tensor.zero_point is not None]
    whole = QuantizedTensor(
        torch.cat([tensor.codes for tensor in tensors]),
        torch.cat([tensor.scale for tensor in tensors]),
        torch.cat(zeros) if zeros else None,
        None,
        tensors[0].grid,
    )
    return replace(forms[0], tensor=whole, bias=bias_O)


def _bias(form: Expression) -> torch.Tensor:
    bias_O = form.dense_bias()
    if bias_O is not None:
        return bias_O
    numbers = form.tensor.scale if isinstance(form, Quantized) else form.dense_weight()
    return torch.zeros(form.shape[0], dtype=numbers.dtype)
