"""What a search found: every trial, the front, what was selected, and what of it was compressed for real."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmcompress.records.rows import Record

VERSION: Literal[1] = 1


class SearchTrial(Record):
    """One plan that was judged."""

    number: int
    """In the database of the study."""
    chosen: dict[str, str]
    """What was decided → option; what had one option only is left out."""
    tokens: int
    loss: float | None
    """Mean KL divergence from the dense model, nats per token; None: it could not be judged."""
    costs: dict[str, float]
    problem: str | None = None
    uniform: str | None = None
    """The option of all linears, for a plan that has one option everywhere."""
    worker: str = ""
    began: float = 0.0
    """Seconds since the first trial began."""
    seconds: float = 0.0


class Difference(Record):
    """A difference of two plans on the same windows."""

    mean: float
    standard_error: float
    """Paired, over windows."""


class MadeModel(Record):
    """A plan that was compressed for real, by its recipe, and measured on the text of the evaluation."""

    trial: int
    folder: str
    uniform: str | None
    bytes: int
    planned_bytes: float | None
    text: str
    window: int
    bos: bool
    perplexity_dense: float
    perplexity: float
    ratio: float
    ratio_error: float | None
    """Standard error of the ratio of perplexities."""
    kl: float | None
    kl_error: float | None


class SearchReport(Record):
    """Written as `front.json` and shown as a report."""

    version: Literal[1] = VERSION
    model: str
    folder: str
    optimizer: str
    axes: tuple[str, ...]
    """Costs."""
    limits: dict[str, float]
    dense: dict[str, float]
    """What the dense model costs."""
    units: dict[str, tuple[str, ...]]
    """What was to be decided → its options."""
    plans: float
    """So many plans the space has."""
    trials: tuple[SearchTrial, ...]
    front: tuple[int, ...]
    """Numbers of trials, by loss; all on the same text."""
    selected: int | None
    """None: no plan keeps the limits."""
    nearest: int | None = None
    """The plan that exceeds the limits least, where none keeps them."""
    better_uniform: int | None = None
    """A uniform plan that costs no more than the selected one and loses less; None: there is none."""
    beside_uniform: dict[int, Difference] = Field(default_factory=dict)
    """Uniform plan by its trial → its loss minus that of the selected plan, on the text that plans were judged on."""
    kept: dict[int, dict[str, float]] = Field(default_factory=dict)
    """Trial of the front → site → bytes ÷ bytes of the dense linear; 0 in a dropped block."""
    importance: dict[str, float] = Field(default_factory=dict)
    """What was decided → the share of the loss's variance that it explains, over all trials on the first text."""
    hypervolume: tuple[tuple[int, float], ...] = ()
    """After so many trials, the hypervolume of the front in loss and first cost, relative to the end."""
    made: tuple[MadeModel, ...] = ()
    settings: str
    """The search file, resolved."""
    versions: dict[str, str]
    machine: dict[str, str]
    notes: tuple[str, ...] = ()

    def trial(self, number: int) -> SearchTrial:
        """By its number."""
        return next(each for each in self.trials if each.number == number)
