"""The interface of progress reporting: stages, steps, notes."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Two levels: a stage (compress, evaluate, save) and its steps, with the current substep."""

    def stage(self, title: str, steps: int) -> None:
        """Begin a stage of `steps` equal steps; it ends when the next begins or the run does."""

    def step(self, text: str) -> None:
        """One more step of the stage is done; `text` names it (`block 3/12`)."""

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        """What the current step is doing (`gptq: mlp.down_proj`), and how many of its equal parts are `done`.

        The display estimates the time left; 0 of 0: unknown.
        """

    def note(self, text: str) -> None:
        """One line that must stay visible: a fallback, a warning, a decision."""


class Silent:
    """Shows nothing: the default of the Python interface; `cli/terminal.py` has the one that people see."""

    def stage(self, title: str, steps: int) -> None:
        """Nothing."""

    def step(self, text: str) -> None:
        """Nothing."""

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""
