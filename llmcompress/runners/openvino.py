"""OpenVINO in this process: it runs folders that the exporter `openvino` or Optimum wrote. B = sequences, T = tokens,
V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, Self

import numpy
import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.tokens import max_positions
from llmcompress.errors import CompressError, ExitCode
from llmcompress.loading.config import read_config
from llmcompress.runners.base import RUNNERS, Runner
from llmcompress.runners.openvino_package import openvino_operations, openvino_package
from llmcompress.runners.work import Work

FILE = "openvino_model.xml"
Precision = Literal["exact", "default"]
EXACT: Mapping[str, str] = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
"""Everything in float32. OpenVINO's default takes bfloat16 where the processor has it, and rounds activations to int8
before compressed matrices.
"""
_LAST = 2**31 - 1
_RANK = 3
_DECOMPRESSION = frozenset({"Convert", "Subtract", "Multiply", "Reshape", "Transpose"})


@RUNNERS.register("openvino")
class OpenVinoRunner(Runner):
    """On the CPU, whatever device is asked for, with as many threads as PyTorch has.

    Float32 computes exactly; any other dtype leaves precision to OpenVINO, as its users do.
    """

    name = "openvino"

    def __init__(self, folder: Path, *, precision: Precision = "exact") -> None:
        """Raises: CompressError for a folder that OpenVINO cannot read."""
        self._core, self._file = openvino_package("runner.package").Core(), folder / FILE
        self._settings = {
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
            "PERFORMANCE_HINT": "LATENCY",
            **(EXACT if precision == "exact" else {}),
        }
        self.device = torch.device("cpu")
        graph = self._graph()
        self._inputs = {name for port in graph.inputs for name in port.get_names()}
        self.vocabulary = graph.output("logits").get_partial_shape()[-1].get_length()
        self.max_positions = max_positions(read_config(folder)[0])
        self._compiled: dict[bool, Any] = {}
        """For the logits of all positions, or of the last one: the one that was used last."""

    @classmethod
    @override
    def open(cls, model: str, *, device: torch.device, dtype: torch.dtype) -> Self:
        folder = Path(model)
        if not (folder / FILE).is_file():
            raise CompressError(
                "model.unloadable",
                f"there is no {FILE} in it",
                where=model,
                fix="write such a folder with `llmcompress export MODEL --to openvino`",
                exit_code=ExitCode.USAGE,
            )
        return cls(folder, precision="exact" if dtype == torch.float32 else "default")

    @override
    def logits(self, ids_BT: Tensor) -> Tensor:
        return self._step(self._request(last_only=False), ids_BT, 0)

    @override
    def stream(self, ids_BT: Tensor, *, max_new_tokens: int) -> Iterator[Tensor]:
        request, before = self._request(last_only=True), 0
        for _ in range(max_new_tokens):
            new_B1 = self._step(request, ids_BT, before)[:, -1:].argmax(-1)
            yield new_B1[:, 0]
            before, ids_BT = before + ids_BT.shape[1], new_B1

    @override
    def work(self, ids_BT: Tensor) -> Work:
        """From the graph: products with constants, and attention over the whole square; a decode step reads those
        constants as they are in the file.
        """
        sequences, tokens = ids_BT.shape
        graph = self._graph()
        head, per_token, read, squares, cached = _head(graph), 0, 0, 0, 0
        for node in graph.get_ops():
            kind = node.get_type_name()
            if kind == "MatMul":
                constants = {
                    each.get_name(): each.get_byte_size() for each in _constants(node.input_value(1).get_node())
                }
                read += sum(constants.values())
                share = 1 if node.get_name() == head.get_name() else tokens
                per_token += share * prod(node.input_value(1).get_shape()) if constants else 0
            elif kind == "ScaledDotProductAttention":
                squares += _width(node.input_value(0)) + _width(node.input_value(2))
            elif kind == "ReadValue":
                cached += _width(node.output(0))
        width = self._model(last_only=True).get_property("KV_CACHE_PRECISION").size
        flops = 2 * sequences * (per_token + tokens**2 * squares)
        return Work(flops, read, sequences * tokens * cached * width)

    @override
    def close(self) -> None:
        self._compiled.clear()

    def _graph(self) -> Any:
        try:
            return self._core.read_model(str(self._file))
        except RuntimeError as problem:
            raise CompressError(
                "model.unloadable",
                f"OpenVINO cannot read it: {str(problem).splitlines()[-1]}",
                where=str(self._file),
                fix="export the model again, or install a newer `openvino`",
            ) from problem

    def _model(self, *, last_only: bool) -> Any:
        if last_only not in self._compiled:
            self._compiled.clear()  # two would take twice the memory
            graph = self._graph()
            if last_only:
                _keep_last_position(graph)
            self._compiled[last_only] = self._core.compile_model(graph, "CPU", self._settings)
        return self._compiled[last_only]

    def _request(self, *, last_only: bool) -> Any:
        """With nothing in its state."""
        return self._model(last_only=last_only).create_infer_request()

    def _step(self, request: Any, ids_BT: Tensor, before: int) -> Tensor:
        """B×T×V (or B×1×V) of tokens that follow `before` others."""
        sequences, tokens = ids_BT.shape
        place_T = numpy.arange(before, before + tokens, dtype=numpy.int64)
        given = {
            "input_ids": ids_BT.cpu().to(torch.int64).numpy(),
            "attention_mask": numpy.ones((sequences, before + tokens), dtype=numpy.int64),
            "position_ids": numpy.broadcast_to(place_T, (sequences, tokens)).copy(),
            "beam_idx": numpy.arange(sequences, dtype=numpy.int32),
        }
        request.infer({name: value for name, value in given.items() if name in self._inputs})
        return torch.from_numpy(request.get_tensor("logits").data.copy())


def _keep_last_position(graph: Any) -> None:
    """The head multiplies the last position alone: a prefill then has no logits of a whole text."""
    make, head = openvino_operations(), _head(graph)
    whole = head.input_value(0)
    if whole.get_partial_shape().rank.get_length() == _RANK:
        start, stop, step, axis = (make.constant([number], dtype=numpy.int64) for number in (-1, _LAST, 1, 1))
        head.input(0).replace_source_output(make.slice(whole, start, stop, step, axis).output(0))
        graph.validate_nodes_and_infer_types()


def _head(graph: Any) -> Any:
    """The last product of a model."""
    node = graph.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    return node


def _constants(node: Any) -> Iterator[Any]:
    """Those that a weight is made of; none where it is computed from inputs."""
    kind = node.get_type_name()
    if kind == "Constant":
        yield node
    elif kind in _DECOMPRESSION:
        for port in node.inputs():
            yield from _constants(port.get_source_output().get_node())


def _width(port: Any) -> int:
    """Numbers for one token of one sequence: of all heads together."""
    return prod(size.get_length() for size in port.get_partial_shape() if size.is_static)
