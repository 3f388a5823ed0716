"""Asks Optimum for a model's graph with placeholders: what of the model it is given, and how it is run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.environments.known import environment_called
from llmcompress.environments.use import run
from llmcompress.exporters import openvino_graph
from llmcompress.exporters.auxiliary_files import copy_auxiliary_files
from llmcompress.exporters.base import Writing
from llmcompress.exporters.checkpoint import owner_of
from llmcompress.exporters.config import portable_config
from llmcompress.exporters.contents import contents_in
from llmcompress.exporters.openvino_form import form_of
from llmcompress.exporters.openvino_tokenizer import simplify_decoder
from llmcompress.modules.expression import Expression, Tied
from llmcompress.progress import LOG

ENVIRONMENT = "optimum-intel"
GRAPH = "openvino_model"
TOKENIZER = ("openvino_tokenizer", "openvino_detokenizer")
_BLOCK_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class GraphRequest:
    """A model as the graph's maker sees it."""

    model: nn.Module
    shapes: Mapping[str, tuple[int, int]]
    """Name of every module that multiplies by a matrix or looks up its rows → the matrix's outputs and inputs."""
    vectors: Mapping[str, Tensor]
    """Everything else, under its own name."""
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Numbers that modules were built with, where they are not those of the stock model."""
    as_dense: bool = False
    """What the graph cannot hold becomes one ordinary matrix."""

    def form(self, name: str) -> Expression:
        """What such a module computes. Asked anew each time: who keeps it keeps its weights in memory."""
        form = form_of(self.model.get_submodule(name), as_dense=self.as_dense)
        assert form is not None, f"{name} has no matrix"
        return form if (owner := self._tied_to(name)) is None else Tied(owner, form)

    @property
    def marks(self) -> dict[str, int]:
        """The first number of each placeholder: modules that read the same input have different ones, or nodes would
        be merged; those at the same place in other blocks have the same.
        """
        places: dict[str, int] = {}
        return {
            name: places.setdefault(_BLOCK_NUMBER.sub(".#.", name, count=1), len(places) + 1) for name in self.shapes
        }

    def write(self, folder: Path) -> None:
        """The files that `openvino_graph.py` reads, but for the config and the tokenizer."""
        marks = self.marks
        matrices = {name: {"shape": list(shape), "mark": marks[name]} for name, shape in self.shapes.items()}
        request = {"matrices": matrices, "attributes": self.attributes, "tokenizer": (folder / "tokenizer").is_dir()}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        save_file(dict(self.vectors), folder / "vectors.safetensors")

    def _tied_to(self, name: str) -> str | None:
        """The embedding whose parameter an ordinary head is."""
        weight = self.model.get_submodule(name)._parameters.get("weight")
        for other in self.shapes:
            table = self.model.get_submodule(other)
            if other != name and isinstance(table, nn.Embedding) and weight is not None and table.weight is weight:
                return other
        return None


def request_of(model: PreTrainedModel, storage_dtype: torch.dtype, *, as_dense: bool) -> GraphRequest:
    """Everything of a model that the graph needs; vectors as they are stored, in float32."""
    shapes, biases = dict[str, tuple[int, int]](), dict[str, Tensor]()
    for name, module in model.named_modules():
        form = form_of(module, as_dense=as_dense) if owner_of(name, shapes) is None else None
        if form is not None:
            shapes[name] = form.shape
            bias = form.dense_bias()
            biases |= {} if bias is None else {f"{name}.bias": bias}
    others = {name: tensor for name, tensor in model.state_dict().items() if owner_of(name, shapes) is None}
    vectors = {name: _stored(tensor, storage_dtype) for name, tensor in (others | biases).items()}
    found = contents_in(model, storage_dtype).differences.attributes
    attributes = {name: each for name, each in found.items() if name not in shapes}
    return GraphRequest(model, shapes, vectors, attributes, as_dense)


def build_graph(model: PreTrainedModel, request: GraphRequest, folder: Path, writing: Writing) -> Path:
    """The graph's file, in a folder below; files of the tokenizer are beside it where it could be converted.

    Raises: CompressError when Optimum cannot export this family, or its environment cannot be built.
    """
    write_request(model, request, folder, writing)
    # -P: the folder of the program holds modules of ours with names that others have too
    arguments = ["-P", str(Path(openvino_graph.__file__).resolve()), str(folder)]
    run(environment_called(ENVIRONMENT), arguments, doing="building OpenVINO's graph", progress=writing.progress)
    graph = folder / "graph"
    if writing.tokenizer is not None and not all((graph / f"{name}.xml").is_file() for name in TOKENIZER):
        LOG.warning(
            "openvino_tokenizers cannot convert this tokenizer: OVModelForCausalLM and our runner read the folder, "
            "openvino_genai does not"
        )
    return graph / f"{GRAPH}.xml"


def write_request(model: PreTrainedModel, request: GraphRequest, folder: Path, writing: Writing) -> None:
    """All that the graph's maker reads."""
    folder.mkdir(parents=True)
    config = {**portable_config(model, torch.float32), "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if writing.tokenizer is not None:
        (folder / "tokenizer").mkdir()
        copy_auxiliary_files(None, folder / "tokenizer", writing.tokenizer)
        simplify_decoder(folder / "tokenizer")
        (folder / "tokenizer" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    request.write(folder)


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Parameters and floating buffers with values of the stored dtype; a copy that shares no memory."""
    value = tensor.detach().to("cpu", copy=True)
    return value.to(dtype).float().contiguous() if value.is_floating_point() else value.contiguous()
