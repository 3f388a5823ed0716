"""A short table of what experiments cannot decide: weights that are not changed, each with its reason.

Fused projections, grouped queries, `1 + weight` norms, parallel blocks and the like need no row: `probe` measures them.
What it does not find is not offered; known cases:

* v → o where a single token does not attend fully to itself (attention sinks) or attention has an output gate;
* up → down where both branches are positively homogeneous (a ReLU gate): they cannot be told apart;
* a norm that feeds a router: its readers could be scaled, but a router must stay exactly as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from llmcompress.model.block_experiment import LINEARS, sizes
from llmcompress.model.map import Refusal

NEVER_EXECUTED = "never executed as a module, so nothing can be measured at its input"


@dataclass(frozen=True)
class Kept:
    """One row of the table: a reason, and whether it applies to a parameter of a module standing in a parent."""

    reason: str
    applies: Callable[[nn.Module, nn.Module, nn.Parameter], bool]


def _is_router(parent: nn.Module, module: nn.Module, parameter: nn.Parameter) -> bool:
    rows = sizes(module)[0] if isinstance(module, LINEARS) else parameter.shape[0]
    in_bank = any(_is_bank(parent, module, other) for other in module.parameters(recurse=False))  # a bank's biases
    return parameter.dim() == 2 and not in_bank and rows in _expert_counts(parent)


def _is_bank(parent: nn.Module, module: nn.Module, parameter: nn.Parameter) -> bool:
    return parameter.dim() == 3 and not isinstance(module, _ConvNd)  # the kernel of a convolution is 3-D too


def _is_loose_matrix(parent: nn.Module, module: nn.Module, parameter: nn.Parameter) -> bool:
    return parameter.dim() >= 2 and not isinstance(module, LINEARS)


TABLE = (
    Kept("router: rounding it re-routes tokens", _is_router),
    Kept("expert bank stored as one 3-D parameter; kept as is in this version", _is_bank),
    Kept("not the matrix of a linear; kept as is", _is_loose_matrix),
)
"""Looked up from the top; the first row that applies gives the reason."""


def refusals(block: nn.Module) -> list[Refusal]:
    """The modules and parameters of a block that no pass may touch, by name relative to the block."""
    found = []
    for parent_name, parent in block.named_modules():
        for leaf, module in parent.named_children():
            for key, parameter in module.named_parameters(recurse=False):
                row = next((row for row in TABLE if row.applies(parent, module, parameter)), None)
                if row is not None:
                    name = ".".join(part for part in (parent_name, leaf, key) if part)
                    found.append(Refusal(name.removesuffix(".weight"), row.reason))
    return found


def _expert_counts(parent: nn.Module) -> set[int]:
    """Lengths of the lists and banks of experts that stand directly in a module."""
    lists = {len(child) for child in parent.children() if isinstance(child, nn.ModuleList)}
    matrices = ((child, p) for child in parent.children() for p in child.parameters(recurse=False))
    return lists | {p.shape[0] for child, p in matrices if _is_bank(parent, child, p)}
