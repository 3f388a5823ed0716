"""The graph of a model with a hole for every matrix, as Optimum writes it, and what each hole is of this model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmcompress.environments.known import environment_called
from llmcompress.environments.use import run
from llmcompress.errors import CompressError
from llmcompress.exporters import onnx_graph_program
from llmcompress.exporters.config import portable_config
from llmcompress.exporters.contents import Contents
from llmcompress.exporters.onnx_package import onnx_package
from llmcompress.modules.expression import Expression, Gather, Tied
from llmcompress.modules.expression_leaves import Dense
from llmcompress.progress import Progress

ENVIRONMENT = "optimum-onnx"


@dataclass(frozen=True)
class Plan:
    """What the graph is made from: no weights."""

    config: Mapping[str, Any]
    holes: Mapping[str, Expression]
    """Full name of a module → what is computed there."""
    parameters: Mapping[str, tuple[int, ...]]
    """All others, with their shapes."""
    attributes: Mapping[str, Mapping[str, Any]]
    """Numbers that modules were built with, where they differ from what the config says."""
    sequence: int | None = None
    """Tokens of a graph whose sizes are all fixed, for one sequence and without a cache; None: any number, with one."""

    @property
    def tied(self) -> frozenset[str]:
        """Embeddings whose table the head multiplies by."""
        return frozenset(form.owner for form in self.holes.values() if isinstance(form, Tied))

    def to_json(self) -> dict[str, Any]:
        """For the program."""
        holes = {
            name: {"width": form.shape[1 if isinstance(form, Gather) else 0], "looks_up": isinstance(form, Gather)}
            for name, form in self.holes.items()
        }
        parameters, attributes = dict(self.parameters), dict(self.attributes)
        return {"holes": holes, "parameters": parameters, "attributes": attributes, "sequence": self.sequence}


def plan_of(model: PreTrainedModel, contents: Contents, storage_dtype: torch.dtype) -> Plan:
    """Every replaced module and every ordinary linear or embedding is a hole; subclasses compute more than a matrix."""
    holes: dict[str, Expression] = {name: module.expression() for name, module in contents.modules.items()}
    tables: dict[int, str] = {}
    for name, module in model.named_modules():
        if any(name == other or name.startswith(f"{other}.") for other in contents.modules):
            continue
        if type(module) is nn.Embedding:
            holes[name] = Gather(Dense(module.weight))
            tables[id(module.weight)] = name
        elif type(module) in (nn.Linear, Conv1D):
            holes[name] = _linear(module, tables)
    parameters = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if not any(name.startswith(f"{hole}.") for hole in holes)
    }
    config = portable_config(model, storage_dtype)
    return Plan(config, holes, parameters, contents.differences.attributes)


def _linear(module: nn.Module, tables: Mapping[int, str]) -> Expression:
    weight, bias_O = module.weight, module.bias
    assert isinstance(weight, nn.Parameter) and isinstance(bias_O, nn.Parameter | None)
    if isinstance(module, Conv1D):
        return Dense(weight.T, bias=bias_O)
    form, owner = Dense(weight, bias=bias_O), tables.get(id(weight))
    return form if owner is None else Tied(owner, form)


def graph_with_holes(plan: Plan, progress: Progress) -> Any:
    """The `ModelProto` that Optimum makes of the config, in its own environment.

    Raises: CompressError when the environment cannot be built, or Optimum does not know the model.
    """
    package = onnx_package()
    with tempfile.TemporaryDirectory(prefix="llmcompress-onnx-") as folder:
        place, output = Path(folder) / "plan.json", Path(folder) / "graph.onnx"
        place.write_text(json.dumps(plan.to_json()), encoding="utf-8")
        (place.parent / "config.json").write_text(json.dumps(dict(plan.config)), encoding="utf-8")
        # -P: not the folder of the program, where a file is called as the package it imports
        program = ["-P", str(Path(onnx_graph_program.__file__)), str(place), str(output)]
        run(environment_called(ENVIRONMENT), program, doing="graph", progress=progress)
        model = package.load(str(output))
    _check(model, plan)
    return model


def holes_in(model: Any) -> dict[str, Any]:
    """Name of a hole → its node."""
    return {
        attribute.s.decode(): node
        for node in model.graph.node
        if node.domain == onnx_graph_program.DOMAIN
        for attribute in node.attribute
        if attribute.name == "module"
    }


def _check(model: Any, plan: Plan) -> None:
    """That the graph computes with every matrix and parameter of the model, and with nothing else.

    Raises: CompressError with what is missing.
    """
    found = set(holes_in(model)) | {each.name for each in model.graph.initializer}
    missing = sorted((set(plan.holes) | set(plan.parameters)) - found)
    if missing:
        raise CompressError(
            "export.graph",
            f"Optimum's graph of this model does not use {len(missing)} of its tensors",
            where=", ".join(missing[:5]),
            fix="this is a bug in llmcompress: please report it with the model's config",
        )
