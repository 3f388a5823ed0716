"""What a long run tells its user while it works: stages, blocks, an estimate of the time left, memory."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Two levels: a stage (compress, evaluate, save) and the steps inside it."""

    def stage(self, title: str, steps: int) -> None:
        """Begin a stage of `steps` equal steps; it ends when the next begins or the run does."""

    def step(self, text: str) -> None:
        """One more step of the stage is done; `text` names it (`block 3/12`)."""

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        """What the running step is doing now (`gptq: mlp.down_proj`), and how many of its equal parts are `done`.

        Whoever shows it works out the time left; 0 of 0: nobody knows.
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
