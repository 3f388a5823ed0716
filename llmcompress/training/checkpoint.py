"""The state of a training in one file: weights, optimizer, masks, random states; never pickled, replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from llmcompress.errors import NOTHING_SAVED
from llmcompress.storage.atomic import replacing
from llmcompress.storage.checked_tensors import own_memory
from llmcompress.storage.disk import disk_errors

_FACTS = "llmcompress.training"
"""Metadata key of everything that is not a tensor."""


class Stateful(Protocol):
    """Masks, objectives and callbacks: objects with state besides the weights."""

    def state(self) -> dict[str, Tensor]:
        """State for resuming."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""


@dataclass(frozen=True)
class Reached:
    """The progress of a training."""

    step: int
    losses: tuple[float, ...] = ()
    tokens: int = 0
    finished: bool = False
    validation: float | None = None
    """The validation loss before the first step."""
    scaler: Mapping[str, Any] = field(default_factory=dict)
    """fp16's loss scale."""
    random: Mapping[str, Tensor] = field(default_factory=dict)
    """States of the random generators, by process and kind."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a training keeps its state, and what belongs to it.

    The file stays when the training is done, without the optimizer: a pass that trains several times, killed in the
    second training, skips the first. A file of another training (`fingerprint`), or a damaged one, is as good as none.
    """

    path: Path
    fingerprint: str
    parameters: Sequence[nn.Parameter]
    optimizer: Optimizer
    parts: Mapping[str, Stateful]

    def save(self, reached: Reached) -> None:
        """Replace the file atomically.

        Raises: CompressError when the disk is full; the old file is kept.
        """
        tensors = {f"parameter.{i}": each.detach() for i, each in enumerate(self.parameters)}
        if not reached.finished:
            tensors |= {
                f"optimizer.{i}.{name}": value
                for i, each in enumerate(self.parameters)
                for name, value in self.optimizer.state.get(each, {}).items()
            }
        for name, part in self.parts.items():
            tensors |= {f"{name}.{key}": value.detach() for key, value in part.state().items()}
        tensors |= {f"random.{name}": state for name, state in reached.random.items()}
        facts = {
            "step": reached.step,
            "losses": reached.losses,
            "tokens": reached.tokens,
            "finished": reached.finished,
            "validation": reached.validation,
            "scaler": reached.scaler,
            "fingerprint": self.fingerprint,
        }
        with disk_errors(self.path, saved=self.saved):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as part_file:
                save_file(own_memory(tensors), part_file, metadata={_FACTS: json.dumps(facts)})

    def load(self) -> Reached | None:
        """Bring everything to where `save` left it; None, and nothing touched, when there is no such file."""
        try:
            with safe_open(self.path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})[_FACTS])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError, KeyError):
            return None
        if facts["fingerprint"] != self.fingerprint:
            return None
        for i, parameter in enumerate(self.parameters):
            parameter.data.copy_(tensors[f"parameter.{i}"])
            state = _below(tensors, f"optimizer.{i}.")
            # AdamW keeps its step count on the CPU, wherever the parameter is
            self.optimizer.state[parameter] = {k: v.to(parameter.device) if v.dim() else v for k, v in state.items()}
        for name, part in self.parts.items():
            part.restore(_below(tensors, f"{name}."))
        return Reached(
            facts["step"],
            tuple(facts["losses"]),
            facts["tokens"],
            facts["finished"],
            facts["validation"],
            facts["scaler"],
            _below(tensors, "random."),
        )

    @property
    def saved(self) -> str:
        """Describes what is saved, for error messages."""
        try:
            with safe_open(self.path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})[_FACTS])
        except (OSError, SafetensorError, KeyError):
            return NOTHING_SAVED
        return f"the state of the training after step {facts['step']}, in {self.path}"


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def random_states(device: torch.device) -> dict[str, Tensor]:
    """States of the random generators that a training uses."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore what `random_states` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
