"""What every target answers for a scheme, without a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

from llmcompress.exporters.base import EXPORTERS, Answer, Converted, Exact
from llmcompress.exporters.contents import CodedLinear
from llmcompress.modules.scheme import named_scheme
from llmcompress.records.rows import Record


class TargetAnswer(Record):
    """One cell of the table of targets and schemes."""

    target: str
    scheme: str
    answer: Literal["exact", "converted", "refused"]
    why: str | None = None
    nearest: str | None = None
    """A scheme that the target holds."""


def answers_of_targets(schemes: Iterable[str], inputs: int) -> list[TargetAnswer]:
    """Of every target, for a linear of as many inputs and outputs in a bfloat16 checkpoint.

    Raises: CompressError for a name that is no scheme.
    """
    sites = [CodedLinear("linear", named_scheme(name), inputs, inputs) for name in schemes]
    return [
        _row(target, site.scheme.name, EXPORTERS[target]().check(site, torch.bfloat16))
        for site in sites
        for target in EXPORTERS
    ]


def _row(target: str, scheme: str, answer: Answer) -> TargetAnswer:
    if isinstance(answer, Exact):
        return TargetAnswer(target=target, scheme=scheme, answer="exact", why=answer.doubt)
    if isinstance(answer, Converted):
        return TargetAnswer(target=target, scheme=scheme, answer="converted", why=answer.why)
    near = answer.nearest.name if answer.nearest else None
    return TargetAnswer(target=target, scheme=scheme, answer="refused", why=answer.why, nearest=near)
