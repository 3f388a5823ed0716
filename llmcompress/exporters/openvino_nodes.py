"""Makes nodes of OpenVINO's graph from expressions: compressed constants with their decompression, products, sums.

O = outputs, I = inputs, K = outputs that are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from llmcompress.exporters.openvino_form import matrices
from llmcompress.formats.openvino import Constant, dense, pack
from llmcompress.modules.expression import Chain, Expression, Gather, InputTransform, OutputPlaces, Sum, Tied
from llmcompress.modules.expression_leaves import Dense, Leaf, Quantized
from llmcompress.modules.input_transforms import Selection
from llmcompress.runners.openvino_package import openvino_operations, openvino_package

_INT8 = (-128, 127)
"""Codes of rounded activations, as `round_activations` takes them."""


class NodeMaker:
    """Keeps what nodes share: OpenVINO does not copy the memory of constants, and does not keep it alive."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._package, self._make = openvino_package("export.package"), openvino_operations()
        self._dtype = dtype
        """Of ordinary matrices."""
        self._shared: list[Any] = []
        self._tables: dict[str, Any] = {}
        """Name of an embedding → its table, which a tied head reads too."""

    def product(self, form: Expression, module: str, x: Any) -> Any:
        """The node that multiplies `x` by it, without its bias."""
        return self._product(form, {id(leaf): name for name, leaf in matrices(form, module)}, x)

    def table(self, form: Gather, module: str) -> Any:
        """The node whose rows are looked up."""
        ((name, leaf),) = matrices(form, module)
        self._tables[module] = self._weight(leaf, name)
        return self._tables[module]

    def integers(self, numbers: Tensor) -> Any:
        """An ordinary constant."""
        return self._make.constant(numbers.to(torch.int64).numpy().copy())

    def _product(self, form: Expression, names: Mapping[int, str], x: Any) -> Any:
        if isinstance(form, Chain):
            for link in form.links:
                x = self._product(link, names, x)
            return x
        if isinstance(form, Sum):
            first, *rest = (self._product(term, names, x) for term in form.terms)
            for term in rest:
                first = self._make.add(first, term)
            return first
        if isinstance(form, InputTransform):
            assert isinstance(form.change, Selection)
            chosen = self._make.gather(x, self.integers(form.change.index_K), self.integers(torch.tensor(-1)))
            return self._product(form.inner, names, chosen)
        if isinstance(form, OutputPlaces):
            return self._placed(self._product(form.inner, names, x), form)
        if isinstance(form, Tied):
            return self._make.matmul(x, self._tables[form.owner], False, True)
        assert isinstance(form, Leaf)
        return self._make.matmul(self._rounded(form, x), self._weight(form, names[id(form)]), False, True)

    def _placed(self, kept: Any, form: OutputPlaces) -> Any:
        """One zero behind the K outputs, and every output takes its own or that zero."""
        count = len(form.index_K)
        index_O = torch.full((form.outputs,), count).index_copy(0, form.index_K.cpu(), torch.arange(count))
        rank = kept.get_output_partial_shape(0).rank.get_length()
        before, after = (self.integers(torch.tensor([0] * (rank - 1) + [end])) for end in (0, 1))
        zero = self._make.constant(numpy.float32(0))
        padded = self._make.pad(kept, before, after, "constant", zero)
        return self._make.gather(padded, self.integers(index_O), self.integers(torch.tensor(-1)))

    def _rounded(self, leaf: Leaf, x: Any) -> Any:
        """Inputs on the grid that calibration fixed; others the runtime rounds, or not, as it is set."""
        if not isinstance(leaf, Quantized) or leaf.activations != "tensor":
            return x
        assert leaf.input_scale is not None
        low, high = (self._make.constant(numpy.float32(code * float(leaf.input_scale))) for code in _INT8)
        return self._make.fake_quantize(x, low, high, low, high, _INT8[1] - _INT8[0] + 1)

    def _weight(self, leaf: Leaf, name: str) -> Any:
        """The O×I node in float32, named; it reads compressed constants."""
        if isinstance(leaf, Quantized):
            made = self._decompressed(leaf, name)
        else:
            assert isinstance(leaf, Dense)
            made = self._float(self._constant(dense(leaf.weight.detach().to(self._dtype)), f"{name}/stored"))
        made.set_friendly_name(name)
        return made

    def _decompressed(self, leaf: Quantized, name: str) -> Any:
        packed = pack(leaf.tensor)
        made = self._float(self._constant(packed.codes, f"{name}/codes"))
        if packed.zero_point is not None:
            zero = self._float(self._constant(packed.zero_point, f"{name}/zero_point"))
            made = self._make.subtract(made, zero)
        made = self._make.multiply(made, self._float(self._constant(packed.scale, f"{name}/scale")))
        if len(packed.codes.shape) == 2:
            return made
        return self._make.reshape(made, self.integers(torch.tensor(leaf.shape)), False)

    def _float(self, node: Any) -> Any:
        return node if node.get_element_type() == self._package.Type.f32 else self._make.convert(node, "f32")

    def _constant(self, constant: Constant, name: str) -> Any:
        numbers = constant.data.contiguous().numpy()
        kind, shape = getattr(self._package.Type, constant.type), self._package.Shape(list(constant.shape))
        self._shared.append(numbers)
        made = self._make.constant(self._package.Tensor(numbers, shape, kind), shared_memory=True)
        made.set_friendly_name(name)
        return made
