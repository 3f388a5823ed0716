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
from torch import Tensor
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
from llmcompress.modules.expression import Expression
from llmcompress.progress import LOG

ENVIRONMENT = "optimum-intel"
GRAPH = "openvino_model"
TOKENIZER = ("openvino_tokenizer", "openvino_detokenizer")
_BLOCK_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class GraphRequest:
    """A model as the graph's maker sees it."""

    forms: Mapping[str, Expression]
    """Name of every module that multiplies by a matrix or looks up its rows → what it computes."""
    vectors: Mapping[str, Tensor]
    """Everything else, under its own name."""
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Numbers that modules were built with, where they are not those of the stock model."""

    @property
    def marks(self) -> dict[str, int]:
        """The first number of each placeholder: modules that read the same input have different ones, or nodes would
        be merged; those at the same place in other blocks have the same.
        """
        places: dict[str, int] = {}
        return {
            name: places.setdefault(_BLOCK_NUMBER.sub(".#.", name, count=1), len(places) + 1) for name in self.forms
        }

    def write(self, folder: Path) -> None:
        """The files that `openvino_graph.py` reads, but for the config and the tokenizer."""
        marks = self.marks
        matrices = {name: {"shape": list(form.shape), "mark": marks[name]} for name, form in self.forms.items()}
        request = {"matrices": matrices, "attributes": self.attributes, "tokenizer": (folder / "tokenizer").is_dir()}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        save_file(dict(self.vectors), folder / "vectors.safetensors")


def request_of(model: PreTrainedModel, storage_dtype: torch.dtype, *, multiplied_out: bool) -> GraphRequest:
    """Everything of a model that the graph needs; vectors as they are stored, in float32."""
    contents = contents_in(model, storage_dtype)
    forms, parts = {}, dict(model.named_modules())
    for name, module in parts.items():
        form = form_of(module, multiplied_out=multiplied_out) if owner_of(name, forms) is None else None
        if form is not None:
            forms[name] = form
    vectors = {
        name: _stored(tensor, storage_dtype)
        for name, tensor in model.state_dict().items()
        if owner_of(name, forms) is None
    }
    for name, form in forms.items():
        bias = form.dense_bias()
        if bias is not None:
            vectors[f"{name}.bias"] = _stored(bias, storage_dtype)
    attributes = {name: each for name, each in contents.differences.attributes.items() if name not in forms}
    return GraphRequest(forms, vectors, attributes)


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
        (folder / "tokenizer" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    request.write(folder)


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Parameters and floating buffers with values of the stored dtype; a copy that shares no memory."""
    value = tensor.detach().to("cpu", copy=True)
    return value.to(dtype).float().contiguous() if value.is_floating_point() else value.contiguous()
