"""ONNX Runtime in this process: runs folders whose `model.onnx` has a KV cache. B = sequences, T = tokens, V =
vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from typing_extensions import override

from llmcompress.calibration.tokens import max_positions
from llmcompress.errors import CompressError
from llmcompress.runners.base import RUNNERS, Runner
from llmcompress.runners.onnx_work import work_of
from llmcompress.runners.work import Work
from llmcompress.storage.paths import from_home

FILE = "model.onnx"
_ERRORS = 3
"""Among the levels of its log."""
_NUMBERS = {"tensor(float)": numpy.float32, "tensor(float16)": numpy.float16}


@RUNNERS.register("onnxruntime")
class OnnxRuntimeRunner(Runner):
    """The graph on the CPU, whatever device is asked for, with as many threads as PyTorch has.

    What inputs there are and what the cache is called stands in the graph: some models take no positions. A graph of
    fixed sizes computes the whole text again for every token.
    """

    name = "ONNX Runtime"

    def __init__(self, library: ModuleType, file: Path, config: PretrainedConfig) -> None:
        self._library, self._file, self._config = library, file, config
        options = library.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = _ERRORS
        self._session = library.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._inputs = {each.name: each for each in self._session.get_inputs()}
        self._past = {name: name.replace("past_key_values", "present") for name in self._inputs if "past" in name}
        self._fixed = self._fixed_tokens()
        self.device = torch.device("cpu")
        self.vocabulary = int(config.get_text_config().vocab_size)
        self.max_positions = self._fixed or max_positions(config)

    @classmethod
    @override
    def open(cls, model: str, *, device: torch.device, dtype: torch.dtype) -> Self:
        folder, library = from_home(model), _library()
        if not (folder / FILE).is_file():
            raise CompressError(
                "model.unloadable",
                f"there is no {FILE}",
                where=str(folder),
                fix="give a folder that `llmcompress export --to onnx` wrote",
            )
        try:
            return cls(library, folder / FILE, AutoConfig.from_pretrained(folder))
        except Exception as problem:  # the runtime raises classes of its own, which share no base but this one
            raise CompressError(
                "model.unloadable",
                f"ONNX Runtime cannot load it: {str(problem)[:500]}",
                where=str(folder / FILE),
                fix="export it again; a newer operator may need a newer `onnxruntime`",
            ) from problem

    @override
    def logits(self, ids_BT: Tensor) -> Tensor:
        if self._fixed is not None:
            return torch.cat([self._filled(ids_T[None]) for ids_T in ids_BT.cpu()])
        return self._step(ids_BT.cpu(), self._empty(len(ids_BT)), 0)[0]

    @override
    def stream(self, ids_BT: Tensor, *, max_new_tokens: int) -> Iterator[Tensor]:
        if self._fixed is not None:
            for _ in range(max_new_tokens):
                new_B1 = self.logits(ids_BT)[:, -1:].argmax(-1)
                yield new_B1[:, 0]
                ids_BT = torch.cat([ids_BT.cpu(), new_B1], 1)
            return
        fed_BT, past, length = ids_BT.cpu(), self._empty(len(ids_BT)), 0
        for _ in range(max_new_tokens):
            logits_BTV, past = self._step(fed_BT, past, length)
            length += fed_BT.shape[1]
            new_B = logits_BTV[:, -1].argmax(-1)
            yield new_B
            fed_BT = new_B[:, None]

    @override
    def work(self, ids_BT: Tensor) -> Work | None:
        """From the graph; None where the package `onnx` is not installed."""
        return work_of(self._file, self._config, *ids_BT.shape)

    @override
    def close(self) -> None:
        del self._session

    def _fixed_tokens(self) -> int | None:
        """Tokens of a graph of fixed sizes, which has no cache; None: any number."""
        _, *sizes = self._inputs["input_ids"].shape
        return sizes[0] if sizes and isinstance(sizes[0], int) else None

    def _filled(self, ids_1T: Tensor) -> Tensor:
        """Logits of a text that is filled up at its end, where no token before it looks."""
        assert self._fixed is not None
        tokens = ids_1T.shape[1]
        padded = torch.nn.functional.pad(ids_1T, (0, self._fixed - tokens))
        return self._step(padded, {}, 0)[0][:, :tokens]

    def _step(self, ids_BT: Tensor, past: Mapping[str, Any], length: int) -> tuple[Tensor, dict[str, Any]]:
        """Logits of these tokens, `length` of which are in the cache before them, and the cache after them."""
        sequences, tokens = ids_BT.shape
        whole = {
            "input_ids": ids_BT.numpy(),
            "attention_mask": numpy.ones((sequences, length + tokens), dtype=numpy.int64),
            "position_ids": numpy.arange(length, length + tokens, dtype=numpy.int64)[None].repeat(sequences, 0),
        }
        fed = {name: self._value(value) for name, value in whole.items() if name in self._inputs}
        names = ["logits", *self._past.values()]
        logits, *present = self._session.run_with_ort_values(names, {**fed, **past})
        found = torch.from_numpy(numpy.require(logits.numpy(), requirements="W"))
        return found, dict(zip(self._past, present, strict=True))

    def _empty(self, sequences: int) -> dict[str, Any]:
        """A cache with nothing in it; sizes that are not fixed are those of sequences and of tokens."""
        found = {}
        for name in self._past:
            _, *rest = self._inputs[name].shape
            shape = (sequences, *(size if isinstance(size, int) else 0 for size in rest))
            found[name] = self._value(numpy.zeros(shape, dtype=_NUMBERS[self._inputs[name].type]))
        return found

    def _value(self, array: numpy.ndarray[Any, Any]) -> Any:
        return self._library.OrtValue.ortvalue_from_numpy(numpy.ascontiguousarray(array))


def _library() -> ModuleType:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as problem:
        raise CompressError(
            "runner.package",
            "ONNX files are run by the package `onnxruntime`, which is not installed",
            fix='pip install "llmcompress[onnx]"',
        ) from problem
