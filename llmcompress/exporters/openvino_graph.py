"""A program for the environment of Optimum: builds a model's graph with placeholders for its matrices.

    python openvino_graph.py FOLDER…

A FOLDER holds `config.json`, `request.json` (`GraphRequest` of openvino_request.py writes both), the vectors and a
tokenizer. A placeholder is a matrix of zeros with a mark as its first number: it takes no memory until it is written,
and equal ones of different blocks are written once. So a graph takes a fraction of the memory and disk of its model.
It imports nothing of llmcompress, which that environment does not have.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

TASK = "text-generation-with-past"


def main(folder: Path) -> None:
    """Write `openvino_model.xml` and its weights into `FOLDER/graph`, and the tokenizer as models there."""
    from optimum.exporters.openvino import export_from_model
    from optimum.exporters.openvino.convert import export_tokenizer
    from transformers import AutoTokenizer

    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    model = placeholder_model(folder, request)
    export_from_model(model, output=folder / "graph", task=TASK, stateful=True)
    if request["tokenizer"]:
        export_tokenizer(AutoTokenizer.from_pretrained(folder / "tokenizer"), folder / "graph", task=TASK)


def placeholder_model(folder: Path, request: dict[str, Any]) -> Any:
    """The stock model of the config with the sizes of ours, its vectors, and placeholders."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    _set_attributes(model, request["attributes"])
    vectors = load_file(folder / "vectors.safetensors")
    for name, matrix in request["matrices"].items():
        module = model.get_submodule(name)
        outputs, inputs = matrix["shape"]
        turned = hasattr(module, "nf")  # a Conv1D, which keeps its matrix the other way round
        weight = torch.zeros((inputs, outputs) if turned else (outputs, inputs))
        weight.view(-1)[0] = matrix["mark"]
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        if turned:
            module.nf = outputs
        bias = vectors.pop(f"{name}.bias", None)
        if bias is not None or "bias" in module._parameters:
            module.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    _fill(model, vectors, {f"{name}.{leaf}" for name in request["matrices"] for leaf in ("weight", "bias")})
    return model.eval()


def _set_attributes(model: Any, attributes: dict[str, dict[str, Any]]) -> None:
    """Numbers that modules of ours were built with; those of a config belong to one module alone."""
    for name, values in attributes.items():
        module = model.get_submodule(name)
        for key, value in values.items():
            if key.startswith("config."):
                module.config = copy.copy(module.config)
                setattr(module.config, key.removeprefix("config."), value)
            else:
                setattr(module, key, tuple(value) if isinstance(value, list) else value)


def _fill(model: Any, vectors: dict[str, Any], done: set[str]) -> None:
    """Everything else gets our numbers, or there is no graph."""
    wanted = {name for name, _ in model.named_parameters()} - done
    missing, left = sorted(wanted - vectors.keys()), sorted(vectors.keys() - set(model.state_dict()))
    if missing or left:
        raise SystemExit(f"transformers builds another model here: it has no {left[:5]}, and asks for {missing[:5]}")
    for name, value in vectors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf].data = value
        else:
            module._buffers[leaf] = value.to(module._buffers[leaf].dtype)


if __name__ == "__main__":
    for each in sys.argv[1:]:
        main(Path(each))
