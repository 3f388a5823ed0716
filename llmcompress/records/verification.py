"""What `verify` found of a saved model: one row for every check."""

from __future__ import annotations

from typing import Literal

from llmcompress.records.rows import Record


class Check(Record):
    """One question about a saved model."""

    name: str
    result: Literal["ok", "failed", "skipped"]
    found: str
    """What was found; of a skipped check, why it was not made."""
    where: tuple[str, ...] = ()
    """Files or tensors."""
    folder: str = ""
    """`onnx`, where several formats of a model were published together; empty: where the model itself is."""

    @property
    def title(self) -> str:
        """`files`, or `onnx: files`."""
        return f"{self.folder}: {self.name}" if self.folder else self.name


class Verification(Record):
    """Whether a saved model is what was written, and can be what its report says."""

    model: str
    """What the user called it."""
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """What does not hold."""
        return tuple(each for each in self.checks if each.result == "failed")
