"""The model card: what the model is, what compression cost, how to load it, how it was made, and its limits."""

from __future__ import annotations

from collections.abc import Iterable

from llmcompress.calibration.local_files import is_text_file
from llmcompress.publishing.card_metadata import LIBRARY, CardFacts
from llmcompress.publishing.snippets import snippets_for
from llmcompress.records.evaluation import Evaluation
from llmcompress.records.report import RECIPE
from llmcompress.records.tasks import GenerationComparison
from llmcompress.report.document import Block, Code, Document, Paragraph, Passage, Section, Table
from llmcompress.report.forms import size
from llmcompress.report.kinds import lines
from llmcompress.report.lines import Line
from llmcompress.report.markdown import as_markdown
from llmcompress.report.sections import lines_table
from llmcompress.report.verdict import verdict

MOST_PAIRS = 3
"""Texts of both models that are shown."""
_MOST_WARNINGS = 10
_SHOWN = ("perplexity", "KL from dense, nats per token", "same top token")
"""Of the numbers on texts; the report has all."""


def card_text(facts: CardFacts) -> str:
    """The body of the card, Markdown."""
    sections = [
        Section("What compression costs", list(_cost(facts))),
        Section("How to load it", list(_loading(facts))),
        Section("Side by side", list(_texts(facts.evaluation))),
        Section("How it was made", list(_making(facts))),
        Section("Limits", list(_limits(facts))),
    ]
    return as_markdown(Document(facts.name, _summary(facts), [each for each in sections if each.blocks]))


def _summary(facts: CardFacts) -> str:
    passes = f" ({', '.join(facts.passes)})" if facts.passes else ""
    needs = (
        "This model needs llmcompress: run `pip install llmcompress` and `import llmcompress` before loading it. "
        if LIBRARY.get(facts.formats[0]) == "llmcompress"
        else ""
    )
    return f"{needs}{facts.base.name}, compressed with llmcompress{passes}."


def _cost(facts: CardFacts) -> Iterable[Block]:
    found = facts.evaluation
    said = verdict(found)
    if said:
        yield Paragraph(said, "verdict")
    shown = [line for line in lines(found) if _is_shown(line)]
    if shown:
        yield lines_table(shown, compares=True)
        machine = ", ".join(f"{name} {value}" for name, value in found.machine.items() if value != "none")
        versions = ", ".join(
            f"{name} {found.versions[name]}" for name in ("torch", "transformers") if name in found.versions
        )
        yield Paragraph(f"Measured on: {machine}; {versions}. Intervals are 95 %, paired with the dense model.")
    if len(facts.artifacts) > 1 or facts.exports[0] is not None:
        yield _artifacts(facts)


def _is_shown(line: Line) -> bool:
    return line.kind not in ("perplexity", "divergence") or line.name in _SHOWN


def _artifacts(facts: CardFacts) -> Table:
    """Every format in the repository, and what was checked of it."""
    rows = []
    for artifact, kind, report in zip(facts.artifacts, facts.formats, facts.exports, strict=True):
        place = _folder(facts, artifact) or "/"
        checked = "" if report is None else f"{len(report.read_back)} tensors read back, equal to the model's"
        proof = report.runtime if report is not None else None
        if proof is not None:
            checked += (
                f"; perplexity {proof.perplexity_runtime:.3f} in {proof.runtime}, {proof.perplexity_model:.3f} in "
                f"PyTorch ({proof.tokens} tokens of {proof.text}, window {proof.window}, no BOS)"
            )
        rows.append((kind, place, size(artifact.bytes if report is None else report.bytes), checked))
    return Table(("format", "in", "#size", "checked"), rows, title="Formats")


def _loading(facts: CardFacts) -> Iterable[Block]:
    for artifact, kind in zip(facts.artifacts, facts.formats, strict=True):
        for each in snippets_for(kind, repository=facts.repository, folder=_folder(facts, artifact)):
            yield Code(each.code, each.runtime, each.language)


def _folder(facts: CardFacts, artifact: object) -> str:
    """Where an artifact stands in the repository: `onnx/`, or empty for the root."""
    found = next(each for each in facts.artifacts if each is artifact)
    places = found.places(alone=found is facts.artifacts[0])
    name, place = next(iter(places.items()), ("", ""))
    return place.removesuffix(name)


def _texts(found: Evaluation) -> Iterable[Block]:
    for pairs in found.of_kind(GenerationComparison)[:1]:
        yield Paragraph(f"Greedy texts for prompts of {pairs.source}, by the dense and by the compressed model:")
        for pair in pairs.pairs[:MOST_PAIRS]:
            yield Passage("", pair.prompt, [("dense", pair.dense), ("compressed", pair.compressed)])


def _making(facts: CardFacts) -> Iterable[Block]:
    at = f" at commit {facts.base.commit}" if facts.base.commit else ""
    calibration = facts.recipe.get("calibration") or {}
    made = facts.evaluation.compression
    tokens = made.calibration_tokens if made else 0
    read = f" Calibrated on {tokens:,} tokens of {calibration.get('source')}." if tokens else ""
    version = facts.evaluation.versions.get("llmcompress", "")
    yield Paragraph(f"From {facts.base.name}{at} by llmcompress {version}.{read}")
    if facts.recipe_text:
        base = facts.base.id or "FOLDER_OF_THE_DENSE_MODEL"
        command = f"llmcompress compress {base} --recipe {RECIPE} -o {facts.name}"
        yield Code(command, "Command", "sh")
        source = str(calibration.get("source"))
        if tokens and is_text_file(source):
            yield Paragraph(
                f"{source} is not in this repository: name a text of your own as `calibration.source` in the recipe."
            )
        yield Code(facts.recipe_text, f"Recipe ({RECIPE} in this repository)", "yaml")
    if facts.evaluation.command:
        yield Code(facts.evaluation.command, "Evaluation", "sh")
    yield Code(f"llmcompress verify {facts.repository}", "Check a download against its digests", "sh")


def _limits(facts: CardFacts) -> Iterable[Block]:
    found, made = facts.evaluation, facts.evaluation.compression
    texts = ", ".join(
        dict.fromkeys(line.on for line in lines(found) if line.kind in ("perplexity", "task") and line.on)
    )
    if texts:
        yield Paragraph(
            f"Quality was measured on {texts} and nothing else; on other languages and tasks it may differ."
        )
    else:
        yield Paragraph(
            "Quality was not measured: compare this model with the dense one on your own task before using it."
        )
    if made and made.refused:
        yield Paragraph(f"{len(made.refused)} modules were left as they were; the report in this repository says why.")
    warnings = list(dict.fromkeys([*found.warnings, *(made.warnings if made else ())]))
    yield from (Paragraph(each, "warning") for each in warnings[:_MOST_WARNINGS])
    name = facts.base.id or "the dense model"
    yield Paragraph(f"Whatever limits, biases and terms of use {name} has, this model has too.")
