"""PyTorch in this process: the modules that a loaded model has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.exporters.save import save_model
from llmcompress.plan_search.costs.bench import BENCHES, Bench, byte_tokenizer, empty_codes, random_linear
from llmcompress.plan_search.costs.forms import DENSE, Matrix
from llmcompress.runners.base import Runner
from llmcompress.runners.torch_runner import TorchRunner


@BENCHES.register("torch")
class TorchBench(Bench):
    """Ordinary linears, and ours for codes, which are dequantized for every product."""

    @override
    def products(self, matrix: Matrix, copies: int, *, tied: bool = False) -> Callable[[int], Callable[[], None]]:
        linears = [random_linear(matrix, self.dtype, self.device) for _ in range(copies)]

        def for_tokens(tokens: int) -> Callable[[], None]:
            x_1TI = torch.randn(1, tokens, matrix.inputs, dtype=self.dtype, device=self.device)

            @torch.inference_mode()
            def run() -> None:
                for linear in linears:
                    linear(x_1TI)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)

            return run

        return for_tokens

    @override
    def held_bytes(self, matrix: Matrix) -> int:
        if matrix.form == DENSE:
            return self.dtype.itemsize * matrix.weights
        with torch.device("meta"):
            made = empty_codes(matrix, self.dtype)
        return sum(each.nbytes for each in made.buffers())

    @override
    def transient_bytes(self, matrix: Matrix) -> int:
        """The weights that codes stand for."""
        return 0 if matrix.form == DENSE else self.dtype.itemsize * matrix.weights

    @override
    def save(self, model: PreTrainedModel, folder: Path) -> None:
        save_model(model, folder, "auto", storage_dtype=self.dtype)
        byte_tokenizer().save_pretrained(folder)  # without one nothing is loaded

    @override
    def open(self, model: PreTrainedModel, folder: Path) -> Runner:
        return TorchRunner(model.to(self.device, self.dtype))

    @override
    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, "transformers": transformers.__version__}
