"""What an export was found to hold when it was read back, and how its runtime computes: `export_report.json`."""

from __future__ import annotations

from llmcompress.records.cost import Memory
from llmcompress.records.rows import Record

EXPORT_REPORT = "export_report.json"
"""Its file, in the exported folder."""


class ReadBack(Record):
    """One tensor that was decoded again from the files and compared, bit for bit, with the model's."""

    source: str
    """The module or parameter that it came from."""
    stored_as: str
    """The target's name for its type."""
    values: int
    """Numbers in it."""
    codes_differing: int | None = None
    """None: it holds no codes of ours."""
    scales_differing: int | None = None
    """Scales, zero points and minima."""
    rounding_in_steps: float | None = None
    """How far the target's type for scales and minima moves a weight at most, in steps of its grid; 0: not at all."""
    weights_differing: int | None = None
    """Numbers that another decoder of the format reads differently; None where weights were rounded a second time."""

    @property
    def is_same(self) -> bool:
        """Whether nothing differs."""
        return not (self.codes_differing or self.scales_differing or self.weights_differing)


class RuntimeProof(Record):
    """The exported files as their own runtime computes them, beside the same model in PyTorch."""

    runtime: str
    text: str
    window: int
    """Tokens; every window is a text of its own, without BOS."""
    tokens: int
    """Predicted."""
    largest_logit_difference: float
    mean_logit_difference: float
    same_top: float
    """Fraction of positions at which both hold the same token most likely."""
    kl: float
    """KL(PyTorch ‖ runtime) over the whole vocabulary, mean in nats per token."""
    perplexity_model: float
    perplexity_runtime: float
    greedy_tokens: int
    """Generated greedily by both."""
    greedy_same: int
    """Of those, how many are equal before the first that is not."""
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_to_dense: float | None = None
    """Decoding speed ÷ that of transformers with ordinary float32 weights of the same config, in turns; None: not
    measured, or there was no memory for it."""
    memory: Memory | None = None
    """Of a fresh process in which the runtime alone ran the files; None: not asked for."""


class ExportReport(Record):
    """Written into the folder of every export."""

    target: str
    model: str
    """What the user calls it."""
    bytes: int
    """Of the weight files."""
    unpacked_bytes: int | None = None
    """Of all tensors once a loader has unpacked them; None: they are in memory as in the files."""
    read_back: tuple[ReadBack, ...]
    converted: dict[str, str]
    """Linears that are stored in another form, and why."""
    notes: tuple[str, ...] = ()
    not_run: str | None = None
    """Why the target has no runner here, e.g. because it needs an NVIDIA GPU."""
    runtime: RuntimeProof | None = None
    """None: it was not run, or its runtime is not installed."""

    @property
    def differing(self) -> tuple[ReadBack, ...]:
        """What does not hold what it should."""
        return tuple(row for row in self.read_back if not row.is_same)
