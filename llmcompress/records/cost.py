"""What a model costs on one device: speed, memory, bytes read and energy, as one record per model and setting."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal, Self

from llmcompress.records.rows import Record, Which


class Rate(Record):
    """Something per second in several turns: the median is the result."""

    median: float
    spread: float
    """(Highest - lowest) ÷ median."""
    turns: tuple[float, ...]
    """Every turn, in order: what was measured in one turn compares best."""

    @classmethod
    def of(cls, turns: Sequence[float]) -> Self:
        """Median and spread of these."""
        median = statistics.median(turns)
        return cls(median=median, spread=(max(turns) - min(turns)) / median, turns=tuple(turns))

    def ratio(self, other: Rate) -> RateRatio:
        """How many times as fast as the other, turn by turn; both were measured in turns."""
        found = [ours / theirs for ours, theirs in zip(self.turns, other.turns, strict=True)]
        return RateRatio(median=statistics.median(found), lowest=min(found), highest=max(found))


class RateRatio(Record):
    """The ratio of two rates over all turns."""

    median: float
    lowest: float
    highest: float


class Speed(Record):
    """Greedy decoding with a KV cache after a warm-up. Tokens of all sequences of the batch are added up."""

    prefill: Rate
    """Prompt tokens per second."""
    decode: Rate
    """New tokens per second, without the first, which belongs to the prefill."""
    seconds_to_first_token: float
    """Median."""
    clock: Literal["wall", "processor"]
    """`processor`: CPU seconds of all threads, for a machine that is not idle."""


class Memory(Record):
    """Peak memory of a fresh process that does nothing else; on a GPU, of what torch allocated there."""

    instrument: str | None
    """What was read (`VmHWM, reset before every row`); None where nothing could be."""
    unavailable: str | None = None
    """Why not."""
    libraries: int | None = None
    """Bytes before the model was opened: Python, torch and the runtime; on a GPU 0."""
    loading: int | None = None
    """Peak bytes up to the moment at which the model is ready."""
    running: int | None = None
    """Peak bytes of prefill and decode, weights and libraries included."""


class Traffic(Record):
    """What a step has to compute and to read, counted on the operations that ran, and how near that is to the limits of
    the machine.
    """

    prefill_flops: int
    """Of the matrix products of one prefill, of the whole batch; one multiply-add is two."""
    weight_bytes: int
    """Of weights that one decode step reads, each counted once: of an embedding the rows, of experts those chosen."""
    cache_bytes: int
    """Keys and values that one decode step reads, of the whole batch, at the end of the prompt."""
    matrix_rate_fraction: float | None
    """FLOP/s of the prefill ÷ those of a large matrix product in the same dtype; None if that was not measured."""
    bandwidth_fraction: float | None
    """Bytes per second of decoding ÷ measured memory bandwidth; above 1 where the weights stay in the processor's
    cache; None if that was not measured."""


class Energy(Record):
    """Joules above idle. Where no counter can be read, the reason, and no number."""

    instrument: str | None
    """The counter and what it covers (`NVML, GPU 0`, `RAPL, package-0 + dram`, `battery BAT0`)."""
    unavailable: str | None = None
    """Why there is no number."""
    prefill_joules_per_token: float | None = None
    """Per prompt token."""
    decode_joules_per_token: float | None = None
    """Per new token after the first."""
    idle_watts: tuple[float, float] | None = None
    """Before and after; their mean was subtracted."""
    busy_watts: float | None = None
    """While generating, idle power included."""
    seconds: float | None = None
    """How long the counter was read while the model ran."""


class Cost(Record):
    """One model in one runtime with one batch size and context; a row of the table."""

    kind: Literal["cost"] = "cost"
    of: Which = "model"
    model: str
    runtime: str
    device: str
    """`cpu`, or the name of the accelerator."""
    dtype: str
    """In which the runtime gives its logits."""
    threads: int
    """CPU threads of torch."""
    cores: tuple[int, ...] | None
    """Cores that the process was pinned to; None: it could run on any."""
    batch: int
    context: int
    """Prompt tokens of each sequence."""
    new_tokens: int
    bytes_on_disk: int | None
    """Of the weight files; None for a model in memory."""
    speed: Speed
    memory: Memory
    traffic: Traffic | None
    """None where the runtime cannot tell."""
    energy: Energy

    @property
    def setting(self) -> tuple[int, int]:
        """What two rows must share to be compared: batch size and context."""
        return self.batch, self.context


class MachineLimits(Record):
    """What this machine reaches at best, measured with the same threads."""

    kind: Literal["machine_limits"] = "machine_limits"
    device: str
    threads: int
    dtype: str
    """Of the matrix product."""
    bytes_per_second: float
    """Memory bandwidth: the fastest of a sum, a dot product and a triad over arrays that fit into no cache."""
    flops_per_second: float
    """Of a large square matrix product."""
