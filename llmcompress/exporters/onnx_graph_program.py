"""A program for another interpreter: the ONNX graph of a model, with a hole where each linear and embedding computes.

It runs in the environment `optimum-onnx`, which does not have llmcompress. It gets no weights: matrices are nowhere
needed to follow the computation, and every other parameter is a placeholder under its own name. So the graph of a
large model costs kilobytes.

    python onnx_graph_program.py PLAN.json OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOMAIN = "llmcompress"
"""Of the nodes that stand for a hole: their attribute `module` is its name."""
TASK = "text-generation-with-past"
"""As Optimum calls a causal model with a KV cache."""


def main(plan_file: str, output: str) -> None:
    """Write the graph for the config beside the plan."""
    from optimum.exporters.onnx.convert import export_pytorch
    from optimum.exporters.tasks import TasksManager

    plan = json.loads(Path(plan_file).read_text(encoding="utf-8"))
    model = skeleton(Path(plan_file).parent, plan)
    if plan["sequence"] is not None:
        write_fixed(model, plan["sequence"], Path(output))
        return
    made = TasksManager.get_exporter_config_constructor("onnx", model=model, task=TASK, library_name="transformers")
    config = made(model.config, int_dtype="int64", float_dtype="fp32", use_past_in_inputs=True)
    # without folding a parameter stays what it is, under its name
    export_pytorch(model, config, config.DEFAULT_ONNX_OPSET, Path(output), do_constant_folding=False)


def write_fixed(model: Any, tokens: int, output: Path) -> None:
    """The graph without a cache, for one sequence of exactly so many tokens."""
    from optimum.exporters.onnx.convert import export_pytorch
    from optimum.exporters.tasks import TasksManager

    task = TASK.removesuffix("-with-past")
    made = TasksManager.get_exporter_config_constructor("onnx", model=model, task=task, library_name="transformers")
    settings = {"int_dtype": "int64", "float_dtype": "fp32"}
    kind = type(made(model.config, **settings))

    class Fixed(kind):  # type: ignore[valid-type, misc]
        """Without names for axes, which would make their sizes free."""

        @property
        def inputs(self) -> Any:
            return {name: {} for name in super().inputs}

        @property
        def outputs(self) -> Any:
            return {name: {} for name in super().outputs}

    shapes = {"batch_size": 1, "sequence_length": tokens}
    config = Fixed(model.config, task=task, **settings)
    opset = config.DEFAULT_ONNX_OPSET
    export_pytorch(model, config, opset, output, input_shapes=shapes, do_constant_folding=False)


def skeleton(folder: Path, plan: dict[str, Any]) -> Any:
    """The model of a config with holes in place of `plan["holes"]`, and the sizes of `plan["parameters"]`."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, hole in plan["holes"].items():
        parent, _, leaf = name.rpartition(".")
        fixed = plan["sequence"] is not None
        made = hole_of(name, hole["width"], looks_up=hole["looks_up"], fixed=fixed)
        setattr(model.get_submodule(parent), leaf, made)
    for name, values in plan["attributes"].items():
        for key, value in values.items():
            setattr(model.get_submodule(name), key, tuple(value) if isinstance(value, list) else value)
    names = [name for name, _ in model.named_parameters()]
    if set(names) != plan["parameters"].keys():
        sys.exit(f"transformers builds other parameters: {sorted(set(names) ^ plan['parameters'].keys())[:5]}")
    for number, name in enumerate(names, 1):  # no two alike, or the exporter would make them one
        owner, _, leaf = name.rpartition(".")
        value = torch.nn.Parameter(torch.full(plan["parameters"][name], float(number)), requires_grad=False)
        model.get_submodule(owner)._parameters[leaf] = value
    return model


def hole_of(name: str, width: int, *, looks_up: bool, fixed: bool = False) -> Any:
    """A module with a result of the right shape, which becomes one node of the graph; `fixed`: and says it there."""
    import torch

    class Hole(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Any) -> Any:
            leading = x.shape if looks_up else x.shape[:-1]
            return torch.zeros(*leading, width, dtype=torch.float32)

        @staticmethod
        def symbolic(graph: Any, x: Any) -> Any:
            made, sizes = graph.op(f"{DOMAIN}::Hole", x, module_s=name), x.type().sizes()
            if fixed and sizes is not None:
                leading = sizes if looks_up else sizes[:-1]
                made.setType(x.type().with_dtype(torch.float32).with_sizes([*leading, width]))
            return made

    class HoleModule(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # some model code reads the dtype and device of a linear's weight
            self.register_buffer("weight", torch.empty(0), persistent=False)

        def forward(self, x: Any) -> Any:
            return Hole.apply(x)  # type: ignore[no-untyped-call]

    return HoleModule()


if __name__ == "__main__":
    main(*sys.argv[1:])
