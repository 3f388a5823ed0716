"""On-policy data: batches in which the student, or the teacher, wrote the text itself. B = samples, T = tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.errors import CompressError, ExitCode
from llmcompress.training.data.batch import IGNORED, Batch, Sample, padded
from llmcompress.training.generation import Share, drawn
from llmcompress.training.replay import ReplayBuffer
from llmcompress.training.teacher import Teacher, live


class OnPolicy(BaseModel):
    """Which batches are written by a model, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    fraction: float = Field(default=1.0, ge=0, le=1)
    """Fraction of the batches whose text is generated; the others are given text (GKD's λ)."""
    by: Literal["student", "teacher"] = "student"
    """Who writes; the teacher: sequence-level distillation, with cross-entropy as the objective."""
    prompt: int = Field(default=32, ge=1)
    """Tokens of a window that are the prompt; of prompts with responses, the prompt itself is."""
    tokens: int = Field(default=128, ge=1)
    """Tokens to generate at most."""
    adaptive: bool = False
    """Generate more as the validation loss grows, less as training proceeds, and replay earlier texts (DistiLLM). Needs
    `validation` above 0."""
    buffer: int = Field(default=1000, ge=1)
    """With `adaptive`: texts kept for replay."""
    validate_every: int = Field(default=50, ge=1)
    """With `adaptive`: steps between two validations."""


class Sampler(Protocol):
    """Decides what a step trains on, in place of the batch that was given."""

    def batch(self, step: int, given: Batch, student: PreTrainedModel) -> Batch:
        """For step 1, 2, …; `given` is on the device."""

    def validates(self, step: int) -> bool:
        """Whether the validation loss after this step must be told to `validated`."""

    def validated(self, loss: float | None) -> None:
        """The validation loss, first of all the one before the first step; None: there is no validation."""

    def state(self) -> dict[str, Tensor]:
        """State for resuming."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""


@dataclass(frozen=True)
class Writer:
    """Writes the texts of a batch."""

    settings: OnPolicy
    teacher: Teacher | None
    mix: float = 0.0
    """The teacher's share in what the student writes (MiniLLM)."""
    stop: frozenset[int] = frozenset()

    def write(self, given: Batch, student: PreTrainedModel) -> list[Sample]:
        """One text for every sample that is given, with the same prompt."""
        share = 1.0 if self.settings.by == "teacher" else self.mix
        shares = [Share(student, 1 - share)]
        if share:
            shares.append(Share(live(self.teacher, "text that the teacher writes").model, share))
        vocabulary = None if self.teacher is None else self.teacher.vocabulary
        return drawn(
            prompts(given, self.settings.prompt),
            shares,
            tokens=self.settings.tokens,
            stop=self.stop,
            vocabulary=vocabulary,
        )


class FractionSampler:
    """Generated text in a fixed fraction of the batches, or beside the given text in all of them.

    Source: Agarwal et al., arXiv 2306.13649, algorithm 1.
    """

    def __init__(self, writer: Writer, *, beside: bool = False) -> None:
        self._writer, self._beside = writer, beside

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._writer.settings!r}, {self._writer.mix}, {self._beside})"

    def batch(self, step: int, given: Batch, student: PreTrainedModel) -> Batch:
        """Drawn from torch's random numbers, whose state a training saves."""
        if float(torch.rand(())) >= self._writer.settings.fraction:
            return given
        return joined(self._writer.write(given, student), given, beside=self._beside)

    def validates(self, step: int) -> bool:
        """Never."""
        return False

    def validated(self, loss: float | None) -> None:
        """Nothing depends on it."""

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""


class AdaptiveSampler:
    """Generates with probability φ (1 - step/steps), replays with probability φ · step/steps, else given text.

    φ begins at zero, and grows by 0.1 whenever the validation loss exceeds its reference by 0.1 nats; then that loss is
    the new reference.

    Source: Ko et al., arXiv 2402.03898, section 3.2 and algorithm 1.
    """

    def __init__(self, writer: Writer, *, steps: int, beside: bool = False) -> None:
        self._writer, self._steps, self._beside = writer, steps, beside
        self._phi, self._reference = 0.0, float("nan")
        self._buffer = ReplayBuffer(writer.settings.buffer)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._writer.settings!r}, {self._writer.mix}, {self._steps}, {self._beside})"

    @property
    def phi(self) -> float:
        """Probability that a batch is generated or replayed."""
        return self._phi

    def batch(self, step: int, given: Batch, student: PreTrainedModel) -> Batch:
        """With one random number for the decision."""
        drawn_number = float(torch.rand(()))
        if drawn_number < self._phi * (1 - step / self._steps):
            texts = self._writer.write(given, student)
            self._buffer.add(texts)
        elif drawn_number < self._phi and len(self._buffer) >= len(given.ids_BT):
            texts = self._buffer.some(len(given.ids_BT))
        else:
            return given
        return joined(texts, given, beside=self._beside)

    def validates(self, step: int) -> bool:
        """Every so many steps."""
        return step % self._writer.settings.validate_every == 0

    def validated(self, loss: float | None) -> None:
        """Raise φ when the loss has grown.

        Raises: CompressError where there is no validation.
        """
        if loss is None:
            raise CompressError(
                "training.validation",
                "the adaptive share of generated text follows the validation loss, and there are no validation samples",
                fix="set `training.validation` above 0",
                exit_code=ExitCode.USAGE,
            )
        if self._reference != self._reference:  # the first: not a number yet
            self._reference = loss
        elif loss >= self._reference + 0.1:
            self._phi, self._reference = min(1.0, self._phi + 0.1), loss

    def state(self) -> dict[str, Tensor]:
        """φ, the reference, and the texts."""
        return {"numbers": torch.tensor([self._phi, self._reference], dtype=torch.float64), **self._buffer.state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """What `state` returned."""
        self._phi, self._reference = state["numbers"].tolist()
        self._buffer.restore(state)


def prompts(given: Batch, tokens: int) -> list[Tensor]:
    """What stands before the first token to be learned; where that is nothing, the first `tokens` tokens."""
    lengths_B = (
        torch.full_like(given.ids_BT[:, 0], given.ids_BT.shape[1])
        if given.attention_BT is None
        else given.attention_BT.sum(1)
    )
    first_B = (given.targets_BT != IGNORED).int().argmax(1)
    found = []
    for ids_T, first, length in zip(given.ids_BT, first_B.tolist(), lengths_B.tolist(), strict=True):
        found.append(ids_T[: first + 1] if first else ids_T[: max(1, min(tokens, length - 1))])
    return found


def joined(texts: Sequence[Sample], given: Batch, *, beside: bool) -> Batch:
    """A batch of texts that a model wrote, with the given samples behind them if those stay."""
    device = given.ids_BT.device
    samples = [*texts, *(given_samples(given) if beside else [])]
    own_B = torch.arange(len(samples)) < len(texts)
    batch = padded(samples)
    return Batch(batch.ids_BT, batch.targets_BT, batch.attention_BT, own_B).to(device)


def given_samples(given: Batch) -> list[Sample]:
    """The samples of a batch, without padding."""
    found = []
    for row, ids_T in enumerate(given.ids_BT.cpu()):
        length = len(ids_T) if given.attention_BT is None else int(given.attention_BT[row].sum())
        learned_T = torch.zeros(length, dtype=torch.bool)
        learned_T[1:] = given.targets_BT[row, : length - 1].cpu() != IGNORED
        found.append(Sample(ids_T[:length], learned_T))
    return found
