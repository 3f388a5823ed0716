"""The graph of a model as the builder of onnxruntime-genai writes it, and where in it each matrix computes.

The builder is given a checkpoint in Olive's layout whose linears hold no weights: a few zeros as codes, and as the
scale of every output a number of its own. Whatever the builder merges, cuts or renames, the scales of a node in its
graph say which outputs of which modules it computes. O = outputs, D = width of the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from llmcompress.environments.known import environment_called
from llmcompress.environments.use import run
from llmcompress.errors import CompressError
from llmcompress.exporters.auxiliary_files import copy_auxiliary_files
from llmcompress.exporters.onnx_package import onnx_package
from llmcompress.progress import Progress

ENVIRONMENT = "onnxruntime-genai"
CONFIG = "genai_config.json"
GRAPH = "model.onnx"
_EMBEDDING_NODE = "/model/embed_tokens/Gather"
_BLOCK, _BITS = 32, 4
"""Of the placeholders; their number of inputs is one block, whatever the module has."""
_LARGEST_LABEL = 2**24
"""Float32 holds every whole number below."""


@dataclass(frozen=True)
class Skeleton:
    """A model without its matrices."""

    config: Mapping[str, Any]
    outputs: Mapping[str, int]
    """Name of a linear on disk → how many outputs it has. The head is one."""
    embedding: str
    """Name of the embedding on disk."""
    width: int
    others: Mapping[str, Tensor]
    """All other parameters."""
    tokenizer: PreTrainedTokenizerBase | None
    generation_config: GenerationConfig | None

    @property
    def first(self) -> dict[str, int]:
        """The label of each linear's first output."""
        found, label = dict[str, int](), 0
        for name, outputs in self.outputs.items():
            found[name] = label
            label += outputs
        assert label < _LARGEST_LABEL, "more outputs than labels"
        return found


@dataclass(frozen=True)
class Rows:
    """Consecutive outputs of one linear."""

    linear: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.linear}[{self.start}:{self.stop}]"


def build(skeleton: Skeleton, folder: Path, *, fused: bool, progress: Progress) -> Any:
    """Run the builder into `folder`, in its environment, and return its graph; the folder keeps all its other files.

    `fused`: q, k and v of an attention may become one node.

    Raises: CompressError when the environment cannot be built, or the builder fails.
    """
    given, cache = folder / "skeleton", folder / "cache"
    given.mkdir(parents=True)
    _write(skeleton, given)
    options = [f"disable_qkv_fusion={'false' if fused else 'true'}", "hf_token=false"]
    module = ["-m", "onnxruntime_genai.models.builder", "-i", str(given), "-o", str(folder / "built"), "-c", str(cache)]
    kind = ["-p", "int4", "-e", "cpu", "--extra_options", f"nodes_to_exclude={_EMBEDDING_NODE}", *options]
    run(environment_called(ENVIRONMENT), [*module, *kind], doing="graph", progress=progress)
    return onnx_package().load(str(folder / "built" / GRAPH))


def matrices_in(proto: Any, skeleton: Skeleton) -> Iterator[tuple[Any, list[Rows]]]:
    """Every node that computes with a matrix, and which outputs of which linears it computes.

    Raises: CompressError where the graph does not compute every output of every linear exactly once.
    """
    package = onnx_package()
    stored = {each.name: each for each in proto.graph.initializer}
    starts, seen = skeleton.first, torch.zeros(sum(skeleton.outputs.values()), dtype=torch.int32)
    for node in proto.graph.node:
        if node.op_type == "MatMulNBits":
            label_O = torch.from_numpy(package.numpy_helper.to_array(stored[node.input[2]]).copy()).long().flatten()
            seen[label_O] += 1
            yield node, list(_rows(label_O, starts, skeleton.outputs))
    if bool((seen != 1).any()):
        wrong = [name for name, start in starts.items() if (seen[start : start + skeleton.outputs[name]] != 1).any()]
        raise CompressError(
            "export.graph",
            f"the graph of onnxruntime-genai does not compute each of {len(wrong)} linears once",
            where=", ".join(wrong[:5]),
            fix="this is a bug in llmcompress or in the builder: please report it with the model's config",
        )


def embedding_in(proto: Any) -> Any:
    """The node that looks up the embedding."""
    return next(node for node in proto.graph.node if node.name == _EMBEDDING_NODE)


def _rows(label_O: Tensor, starts: Mapping[str, int], outputs: Mapping[str, int]) -> Iterator[Rows]:
    labels, place = label_O.tolist(), 0
    while place < len(labels):
        name = next(name for name, start in starts.items() if start <= labels[place] < start + outputs[name])
        start, end = labels[place] - starts[name], place
        while end < len(labels) and labels[end] - starts[name] == start + end - place < outputs[name]:
            end += 1
        yield Rows(name, start, start + end - place)
        place = end


def _write(skeleton: Skeleton, folder: Path) -> None:
    """In the layout of Olive: O×bytes codes, O×groups scales, O×bytes zero points."""
    tensors = {name: value.detach().clone().contiguous() for name, value in skeleton.others.items()}
    tensors[f"{skeleton.embedding}.weight"] = torch.zeros(1, skeleton.width)
    for name, start in skeleton.first.items():
        rows = skeleton.outputs[name]
        tensors[f"{name}.qweight"] = torch.zeros(rows, _BLOCK * _BITS // 8, dtype=torch.uint8)
        tensors[f"{name}.scales"] = torch.arange(start, start + rows, dtype=torch.float32)[:, None].contiguous()
        tensors[f"{name}.qzeros"] = torch.zeros(rows, 1, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    layout = {"quant_method": "olive", "bits": _BITS, "group_size": _BLOCK, "symmetric": True, "overrides": {}}
    # a tied head would be one matrix with the embedding, and here it is a linear of its own
    config = {**skeleton.config, "quantization_config": layout, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    copy_auxiliary_files(None, folder, skeleton.tokenizer, skeleton.generation_config)
