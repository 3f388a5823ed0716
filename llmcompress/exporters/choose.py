"""Chooses the exporter of a model: before any work from the recipe, and again from the finished model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from llmcompress.errors import NOTHING_SAVED, CompressError, ExitCode
from llmcompress.exporters.base import EXPORTERS, Answer, Converted, Exact, Exporter, Refused
from llmcompress.exporters.bitsandbytes import BitsAndBytesExporter
from llmcompress.exporters.compressed_tensors import CompressedTensorsExporter
from llmcompress.exporters.contents import CodedLinear, Contents
from llmcompress.exporters.manifest import ManifestExporter
from llmcompress.exporters.plain import PlainExporter
from llmcompress.formats.compressed_tensors import ZeroPoints
from llmcompress.formats.named import Kind
from llmcompress.modules.limits import TargetLimits

Format = Literal["auto", "compressed-tensors", "plain", "llmcompress"]


@dataclass(frozen=True)
class Choice:
    """The chosen exporter, and its answer for each quantized linear."""

    exporter: Exporter
    contents: Contents
    answers: Mapping[str, Answer]
    notes: tuple[str, ...]
    """What the user should know about how the result is stored, one line each."""

    def tensors(self, site: CodedLinear, storage_dtype: torch.dtype) -> dict[str, Kind]:
        """What the files will hold of a linear, by last name."""
        answer = self.answers.get(site.name)
        holds_codes = isinstance(answer, Exact) or (isinstance(answer, Converted) and answer.keeps_codes)
        writer = self.exporter if holds_codes else PlainExporter()
        return writer.tensors(site, storage_dtype)


def choose(
    wanted: Format, contents: Contents, *, zero_points: ZeroPoints = "folded", saved: str = NOTHING_SAVED
) -> Choice:
    """The first of `candidates` that holds all of it; of several, the first whose loaders leave no doubt.

    Raises: CompressError when none does; `saved` tells the user what is left.
    """
    reasons: list[str] = []
    exporters = candidates(wanted, contents, zero_points)
    for exporter in exporters:
        answers = exporter.answers(contents)
        problem = exporter.problem(contents)
        refused = {name: answer for name, answer in answers.items() if isinstance(answer, Refused)}
        doubts = [each.doubt for each in answers.values() if isinstance(each, Exact) and each.doubt]
        if problem is None and not refused and (not doubts or len(exporters) == 1):
            return Choice(exporter, contents, answers, _notes(exporter, contents, answers, reasons))
        reasons = list(
            dict.fromkeys([*([problem] if problem else []), *(each.why for each in refused.values()), *doubts])
        )
    raise _refusal(exporter, problem, refused, len(contents.sites), saved)


def candidates(wanted: str, contents: Contents, zero_points: ZeroPoints) -> tuple[Exporter, ...]:
    """Who may write it, best first: what stock loaders read, then our own folder. `wanted`: `auto`, or an exporter."""
    if contents.is_stock:
        return (PlainExporter(),)
    if wanted == "auto":
        codes = CompressedTensorsExporter(zero_points=zero_points, multiplies_out=True)
        return (BitsAndBytesExporter(), codes, ManifestExporter())
    if wanted == "compressed-tensors":
        return (CompressedTensorsExporter(zero_points=zero_points),)
    return (EXPORTERS[wanted](),)


def check_export(exporter: Exporter, contents: Contents, *, saved: str = NOTHING_SAVED) -> None:
    """That the target holds all of the model.

    Raises: CompressError with every reason, the nearest schemes, and the targets that do hold it.
    """
    refused = {name: each for name, each in exporter.answers(contents).items() if isinstance(each, Refused)}
    problem = exporter.problem(contents)
    if problem is None and not refused:
        return
    nearest = dict.fromkeys(each.nearest.name for each in refused.values() if each.nearest)
    able = holders(contents)
    ways = [
        f"export it to {' or '.join(able)}" if able else "",
        f"compress it with {' or '.join(nearest)}" if nearest else "",
        exporter.fix if refused and problem is None else "",
    ]
    why = problem or "; ".join(dict.fromkeys(each.why for each in refused.values()))
    raise CompressError(
        "save.format",
        f"{EXPORTERS.name_of(type(exporter))} cannot represent this model: {why}",
        where="; ".join(list(refused)[:5]) + (f"; and {len(refused) - 5} more" if len(refused) > 5 else ""),
        fix=", or ".join(way for way in ways if way) or "compress it with another scheme",
        saved=saved,
        exit_code=ExitCode.USAGE,
    )


def export_notes(exporter: Exporter, contents: Contents) -> list[str]:
    """What the user should know about an export, one line each.

    Raises: CompressError as `check_export` does.
    """
    check_export(exporter, contents)
    name = EXPORTERS.name_of(type(exporter))
    return [f"{name}: {note}" for note in exporter.notes(contents, exporter.answers(contents))]


def holders(contents: Contents) -> tuple[str, ...]:
    """Names of the exporters that can hold a model."""
    found = ((name, EXPORTERS[name]()) for name in EXPORTERS)
    return tuple(
        name
        for name, exporter in found
        if exporter.problem(contents) is None
        and not any(isinstance(answer, Refused) for answer in exporter.answers(contents).values())
    )


def limits_of(wanted: Format) -> TargetLimits:
    """What the target named in a recipe requires of quantizers; `auto` finds a target for any result."""
    return TargetLimits() if wanted == "auto" else EXPORTERS[wanted].limits


def _notes(
    exporter: Exporter, contents: Contents, answers: Mapping[str, Answer], passed_over: Sequence[str]
) -> tuple[str, ...]:
    """Its own, or why it was taken and not the one that stock loaders read."""
    if not isinstance(exporter, ManifestExporter) or not passed_over:
        return tuple(exporter.notes(contents, answers))
    ending = "the model is saved with our manifest and loads only after `import llmcompress`"
    return tuple(f"{reason}; {ending}" for reason in passed_over)


def _refusal(
    exporter: Exporter, problem: str | None, refused: Mapping[str, Refused], sites: int, saved: str
) -> CompressError:
    name = EXPORTERS.name_of(type(exporter))
    lines = [f"{site}: {answer.why}" for site, answer in refused.items()]
    nearest = dict.fromkeys(answer.nearest.name for answer in refused.values() if answer.nearest)
    return CompressError(
        "save.format",
        f"{name} cannot represent this model: {problem}"
        if problem
        else f"{name} cannot represent {len(refused)} of {sites} sites",
        where="; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else ""),
        fix=(f"use {' or '.join(nearest)} there, or " if nearest else "") + exporter.fix,
        saved=saved,
        exit_code=ExitCode.USAGE if saved == NOTHING_SAVED else ExitCode.REFUSED,
    )
