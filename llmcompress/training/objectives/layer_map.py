"""Which layer of the student is compared with which of the teacher."""

from __future__ import annotations

from typing import Literal

from llmcompress.errors import CompressError, ExitCode

Layers = Literal["uniform", "last", "kept"] | dict[int, int]
"""uniform: student layers at equal steps through the teacher, the last with the last; last: that pair alone; kept: each
with the one that it was before pruning; or pairs STUDENT: TEACHER, counted from 0."""


def layer_pairs(layers: Layers, student: int, teacher: int) -> list[tuple[int, int]]:
    """Pairs of layer numbers, for models of so many layers.

    Raises: CompressError for a layer that there is not.
    """
    if layers == "last":
        return [(student - 1, teacher - 1)]
    assert layers != "kept", "which were kept is found before the training begins"
    if layers == "uniform":
        return [(index, max(0, round((index + 1) * teacher / student) - 1)) for index in range(student)]
    for of, at in layers.items():
        if not (0 <= of < student and 0 <= at < teacher):
            raise CompressError(
                "training.layers",
                f"layers {of} and {at} do not exist: the student has {student} and the teacher {teacher}",
                where="layers",
                fix="count from 0",
                exit_code=ExitCode.USAGE,
            )
    return sorted(layers.items())
