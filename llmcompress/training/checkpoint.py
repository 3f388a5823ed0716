"""A training's state in one file: weights, optimizer, masks, random numbers; never pickled, replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from llmcompress.storage.atomic import replacing
from llmcompress.training.masks import Masks


@dataclass(frozen=True)
class Checkpoint:
    """Where a training keeps its state, and after how many steps it does so again.

    The file stays when the training is done: a pass that trains several times, killed in the second training, skips
    the first. A file of another training (`fingerprint`), or a damaged one, is as good as none.
    """

    path: Path
    every: int = 100


@dataclass(frozen=True)
class Reached:
    """How far a training had come."""

    step: int
    losses: tuple[float, ...]
    finished: bool


def save_state(
    path: Path,
    reached: Reached,
    parameters: Sequence[nn.Parameter],
    optimizer: Optimizer,
    masks: Masks,
    *,
    device: torch.device,
    fingerprint: str,
) -> None:
    """Write the file beside the old one and put it in its place."""
    tensors = {f"parameter.{i}": each.detach().contiguous() for i, each in enumerate(parameters)}
    tensors |= {
        f"optimizer.{i}.{name}": value.contiguous()
        for i, each in enumerate(parameters)
        for name, value in optimizer.state.get(each, {}).items()
    }
    tensors |= {f"mask.{name}": value.contiguous() for name, value in masks.state().items()}
    tensors |= {f"random.{kind}": state for kind, state in _random_states(device).items()}
    facts = {
        "step": reached.step,
        "losses": reached.losses,
        "finished": reached.finished,
        "fingerprint": fingerprint,
    }
    with replacing(path) as part:
        save_file(tensors, part, metadata={"llmcompress.training": json.dumps(facts)})


def load_state(
    path: Path,
    parameters: Sequence[nn.Parameter],
    optimizer: Optimizer,
    masks: Masks,
    *,
    device: torch.device,
    fingerprint: str,
) -> Reached | None:
    """Bring everything to where `save_state` left it; None, and nothing touched, when there is none."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["llmcompress.training"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError):
        return None
    if facts["fingerprint"] != fingerprint:
        return None
    for i, parameter in enumerate(parameters):
        parameter.data.copy_(tensors[f"parameter.{i}"])
        state = _below(tensors, f"optimizer.{i}.")
        # AdamW keeps its step count on the CPU, wherever the parameter is
        optimizer.state[parameter] = {k: v.to(parameter.device) if v.dim() else v for k, v in state.items()}
    masks.restore(_below(tensors, "mask."))
    random = _below(tensors, "random.")
    torch.set_rng_state(random["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], device)
    return Reached(facts["step"], tuple(facts["losses"]), facts["finished"])


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states
