"""The loss around students of different objectives: slices, sharpness, and whether two of them are connected.

    OMP_NUM_THREADS=1 python evals/landscapes.py --name books-llama

Students as in `distillation.py` (same start, text, steps and seed), for a few objectives. Measured is the cross-entropy
on windows of `builtin:evaluation`:
  slice     along one random direction, and over a grid of two; every row of a matrix is as long as the student's row
            (filter normalisation), vectors are left alone
  sharpness mean rise of the loss at distance 0.05 over several directions
  barrier   the highest loss on the straight line between two students, above the line between their losses

Source: Li et al., arXiv 1712.09913, sections 4 (filter normalisation) and 5; Frankle et al., arXiv 1912.05671, section
2 (linear mode connectivity). Writes evals/results/landscapes-NAME.json and docs/landscapes.svg.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import matplotlib
import torch
from distillation import OBJECTIVES, Bench
from matplotlib import pyplot
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from llmcompress.evaluation.environment import machine, versions

EVALS = Path(__file__).resolve().parent
CHOSEN = ("cross-entropy alone", "kl", "kl, reverse", "jsd 0.5", "kl + hidden_states (kept)", "minillm")
NEAR = 0.05
Direction = Mapping[str, Tensor]


def direction(model: PreTrainedModel, seed: int) -> Direction:
    """Random, each row as long as the model's own."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            random = torch.randn(weight.shape, generator=generator)
            found[name] = functional.normalize(random, dim=-1) * weight.detach().norm(dim=-1, keepdim=True)
    return found


@contextmanager
def moved(model: PreTrainedModel, steps: Sequence[tuple[float, Direction]]) -> Iterator[None]:
    """The weights with these multiples of directions added."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    try:
        with torch.no_grad():
            for length, along in steps:
                for name, step in along.items():
                    model.get_parameter(name).add_(length * step)
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                model.get_parameter(name).copy_(weight)


@torch.no_grad()
def loss(model: PreTrainedModel, windows: Tensor) -> float:
    """Mean cross-entropy in nats."""
    said = model(input_ids=windows).logits[:, :-1].flatten(0, 1).float()
    return float(functional.cross_entropy(said, windows[:, 1:].flatten()))


def line(model: PreTrainedModel, windows: Tensor, at: Sequence[float]) -> list[float]:
    """Along one direction."""
    along = direction(model, 0)
    return [_at(model, windows, [(length, along)]) for length in at]


def grid(model: PreTrainedModel, windows: Tensor, at: Sequence[float]) -> list[list[float]]:
    """Over two."""
    one, other = direction(model, 0), direction(model, 1)
    return [[_at(model, windows, [(x, one), (y, other)]) for x in at] for y in at]


def sharpness(model: PreTrainedModel, windows: Tensor, directions: int) -> float:
    """Mean rise at a small distance, in nats."""
    here = loss(model, windows)
    found = [_at(model, windows, [(NEAR, direction(model, seed))]) - here for seed in range(directions)]
    return sum(found) / directions


def barrier(one: PreTrainedModel, other: PreTrainedModel, windows: Tensor, points: int) -> float:
    """Of the straight line between two; 0: linearly connected."""
    with torch.no_grad():
        between = {name: other.get_parameter(name) - weight for name, weight in one.named_parameters()}
    shares = [index / (points - 1) for index in range(points)]
    losses = [_at(one, windows, [(share, between)]) for share in shares]
    straight = [(1 - share) * losses[0] + share * losses[-1] for share in shares]
    return max(here - there for here, there in zip(losses, straight, strict=True))


def _at(model: PreTrainedModel, windows: Tensor, steps: Sequence[tuple[float, Direction]]) -> float:
    with moved(model, steps):
        return loss(model, windows)


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--name", default="books-llama", show_default=True)
@click.option("--steps", default=50, show_default=True)
@click.option("--tokens", default=64, show_default=True)
def main(model: str, name: str, steps: int, tokens: int) -> None:
    """Train, measure, draw."""
    bench = Bench(model, windows=256, tokens=tokens)
    training = {"steps": steps, "batch": 8, "learning_rate": 1e-3, "save_every": 10**6}
    windows, at = bench.measured_NT[:16], [round(-0.5 + 0.1 * index, 2) for index in range(11)]
    students = {row: bench.trained(OBJECTIVES[row], training, 0)[0] for row in CHOSEN}
    rows = []
    for row, student in students.items():
        measured = {"loss": loss(student, windows), "sharpness": sharpness(student, windows, 5)}
        rows.append(
            {"row": row, **measured, "line": line(student, windows, at), "grid": grid(student, windows, at[::2])}
        )
        click.echo(f"{row}: {measured}")
    barriers = [
        {"rows": [one, other], "barrier": barrier(students[one], students[other], windows, 9)}
        for one, other in itertools.combinations(students, 2)
    ]
    told: dict[str, Any] = {
        "model": model, "training": training, "tokens": tokens, "at": at, "near": NEAR, "rows": rows,
        "barriers": barriers, "machine": machine(), "versions": versions(),
    }  # fmt: skip
    path = EVALS / "results" / f"landscapes-{name}.json"
    path.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(told)


def draw(told: Mapping[str, Any]) -> None:
    """The slices in one panel, the grids in one each."""
    matplotlib.rcParams["svg.hashsalt"] = "llmcompress"  # the same file from the same numbers
    rows, at = told["rows"], told["at"]
    figure, panels = pyplot.subplots(2, 4, figsize=(13, 6), layout="constrained")
    for row in rows:
        panels[0, 0].plot(at, row["line"], "-", label=row["row"])
    panels[0, 0].set_xlabel("distance, in row lengths")
    panels[0, 0].set_ylabel("cross-entropy, nats")
    panels[0, 0].legend(fontsize=6)
    others = list(panels.flat)[1:]
    for panel, row in zip(others, rows, strict=False):
        panel.contour(at[::2], at[::2], row["grid"], levels=12, linewidths=0.8)
        panel.set_title(row["row"], fontsize=8)
    for panel in others[len(rows) :]:
        panel.axis("off")
    path = EVALS.parent / "docs" / "landscapes.svg"
    figure.savefig(path, metadata={"Date": None})
    click.echo(str(path))


if __name__ == "__main__":
    main()
