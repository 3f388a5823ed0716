"""The verdict of a comparison in one or two plain sentences, computed from measurements alone."""

from __future__ import annotations

from llmcompress.records.evaluation import Measured
from llmcompress.records.gate import GateResult, NotFinite
from llmcompress.records.measurements import Divergence, WeightBytes
from llmcompress.records.tasks import TaskComparison, TaskResult
from llmcompress.report.forms import share, signed
from llmcompress.report.kinds import lines
from llmcompress.report.lines import Line, changed

SAME_SIZE = 0.02
"""Two files that differ by less are called equally large."""

FASTER = 0.03
"""A runtime that is faster by less is not called faster: two runs of one model differ by as much."""


def verdict(measured: Measured) -> str:
    """What compression gained and cost; empty where nothing is compared."""
    gains = [text for text in (_size(measured), *_speeds(measured)) if text]
    losses = [text for text in (_broken(measured), _answers(measured), _text(measured)) if text]
    sentences = ["; ".join(part) for part in (gains, losses) if part]
    gates = [each.broken for each in measured.of_kind(GateResult) if not each.kept]
    sentences += [f"quality gate not kept: {each}" for each in gates]
    return " ".join(f"{text[0].upper()}{text[1:]}." for text in sentences)


def got_worse(measured: Measured) -> list[Line]:
    """Every number that is worse than the dense model's beyond its 95 % interval."""
    return [line for line in lines(measured) if line.is_worse]


def _size(measured: Measured) -> str:
    found = {each.of: each.bytes for each in measured.of_kind(WeightBytes)}
    if not (found.get("dense") and found.get("compressed")):
        return ""
    ratio = found["dense"] / found["compressed"]
    if abs(ratio - 1) < SAME_SIZE:
        return "as large as the dense model"
    return f"{ratio:.1f}× smaller" if ratio > 1 else f"{1 / ratio:.1f}× larger"


def _speeds(measured: Measured) -> list[str]:
    """Of decoding, with one sequence and the shortest context that was measured."""
    found = [line for line in lines(measured) if line.kind == "cost" and line.name.startswith("decode") and line.change]
    if not found:
        return []
    change = found[0].change
    assert change is not None
    if change.low is not None and change.low > 1 + FASTER:
        return [f"decode {change.value:.1f}× as fast"]
    word = "slower" if change.high is not None and change.high < 1 - FASTER else "not faster"
    return [f"decode {change.value:.1f}×: {word} on this runtime"]


def _broken(measured: Measured) -> str:
    found = [each.metric for each in measured.of_kind(NotFinite)]
    return f"computes NaN or Inf on {', '.join(found)}" if found else ""


def _answers(measured: Measured) -> str:
    """Over the documents of all tasks; a group has those of its tasks."""
    tasks = {each.task for each in measured.of_kind(TaskResult)}
    found = [each for each in measured.of_kind(TaskComparison) if each.task in tasks]
    documents = sum(each.right_to_wrong.count for each in found)
    if not documents:
        return ""
    wrong, right = (
        sum(part.mean * part.count for part in parts) / documents
        for parts in ([each.right_to_wrong for each in found], [each.wrong_to_right for each in found])
    )
    if wrong + right == 0:
        return f"no answer of {documents:,} changed between right and wrong"
    return f"{share(wrong + right)} of answers flipped, {share(wrong).removesuffix(' %')} of them to wrong"


def _text(measured: Measured) -> str:
    """Of the text where it lost most."""
    found = measured.of_kind(Divergence)
    if not found:
        return ""
    worst = max(found, key=lambda each: each.loss_increase.mean)
    ratio = changed(worst.perplexity_ratio, is_ratio=True)
    rise = ratio.value - 1
    same = f"{share(worst.same_top.mean)} of the most likely next tokens are the same"
    if ratio.low is not None and ratio.high is not None and ratio.low <= 1 <= ratio.high:
        half = share((ratio.high - ratio.low) / 2)
        return f"perplexity on {worst.text} no different ({signed(rise, 'share')} ± {half}); {same}"
    half_text = "" if ratio.low is None or ratio.high is None else f" ± {share((ratio.high - ratio.low) / 2)}"
    word = "higher" if rise > 0 else "lower"
    return f"perplexity on {worst.text} {share(abs(rise))}{half_text} {word}; {same}"
