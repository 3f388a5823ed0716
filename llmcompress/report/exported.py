"""The report on an export: what was read back, how its runtime computes beside PyTorch, and what was converted."""

from __future__ import annotations

from collections import Counter

from llmcompress.records.export_report import ExportReport, ReadBack, RuntimeProof
from llmcompress.report.document import Block, Document, Paragraph, Section, Table
from llmcompress.report.forms import FORMS, share, significant, size

MOST_ROWS = 20
"""Converted linears that are listed; of a whole model they are hundreds, for few reasons."""


def export_document(found: ExportReport) -> Document:
    """The report on one exported folder."""
    run_by = f", run by {found.runtime.runtime}" if found.runtime else ", not run"
    sections = [
        Section("Verdict", [_verdict(found), Table(("", "#value", "protocol"), _rows(found))]),
        Section("Read back", [_kinds(found.read_back)] if found.read_back else []),
        Section("Converted", _converted(found)),
        Section("Notes", [Paragraph(note, "note") for note in found.notes]),
    ]
    return Document(found.model, f"exported for {found.target}{run_by}", [each for each in sections if each.blocks])


def _verdict(found: ExportReport) -> Paragraph:
    same = len(found.read_back) - len(found.differing)
    parts = [f"{same} of {len(found.read_back)} tensors were read back as the model holds them"]
    if found.converted:
        parts.append(f"{len(found.converted)} linears are stored in another form")
    if found.runtime is not None:
        ratio = found.runtime.perplexity_runtime / found.runtime.perplexity_model
        parts.append(f"the runtime's perplexity is {ratio:.4f} times that of PyTorch")
    return Paragraph("; ".join(parts) + ".", "verdict")


def _rows(found: ExportReport) -> list[tuple[str, str, str]]:
    coded = [row for row in found.read_back if row.codes_differing is not None]
    codes, wrong = sum(row.values for row in coded), sum(row.codes_differing or 0 for row in coded)
    scales = sum(row.scales_differing or 0 for row in coded)
    rows = [
        ("target", found.target, ""),
        ("weight files", size(found.bytes), ""),
        ("codes equal", f"{codes - wrong:,} of {codes:,}", "decoded from the files again, bit for bit"),
        ("scales, zero points and minima that differ", f"{scales:,}", ""),
    ]
    return rows if found.runtime is None else rows + _runtime_rows(found.runtime)


def _runtime_rows(found: RuntimeProof) -> list[tuple[str, str, str]]:
    text = f"{found.text}, window {found.window}, no BOS, {found.tokens:,} tokens"
    nats, perplexity, rate = FORMS["nats"], FORMS["perplexity"], FORMS["rate"]
    rows = [
        ("perplexity of the model in PyTorch", perplexity(found.perplexity_model), text),
        (f"perplexity in {found.runtime}", perplexity(found.perplexity_runtime), text),
        ("logits, largest difference", significant(found.largest_logit_difference), text),
        ("logits, mean difference", significant(found.mean_logit_difference), text),
        ("same top token", share(found.same_top), text),
        ("KL from PyTorch, nats per token", nats(found.kl), text),
        ("greedy tokens equal", f"{found.greedy_same} of {found.greedy_tokens}", "before the first that is not"),
        ("prefill, tokens/s", rate(found.prefill_tokens_per_second), "one run, logits of every position"),
        ("decode, tokens/s", rate(found.decode_tokens_per_second), "one run"),
    ]
    if found.decode_to_dense is not None:
        times = f"{found.decode_to_dense:.2f} ×"
        rows.append(
            ("decode ÷ transformers, dense, float32", times, "median of turns, random weights of the same config")
        )
    if found.memory is not None:
        running = found.memory.running
        told = found.memory.instrument if running is not None else found.memory.unavailable
        rows.append(("peak memory of a fresh process", "–" if running is None else size(running), told or ""))
    return rows


def _kinds(read_back: tuple[ReadBack, ...]) -> Table:
    """By the target's types."""
    tensors, values, differing = Counter[str](), Counter[str](), Counter[str]()
    steps: dict[str, float] = {}
    for row in read_back:
        tensors[row.stored_as] += 1
        values[row.stored_as] += row.values
        differing[row.stored_as] += not row.is_same
        steps[row.stored_as] = max(steps.get(row.stored_as, 0.0), row.rounding_in_steps or 0.0)
    rows = [
        (kind, f"{tensors[kind]:,}", f"{count:,}", f"{differing[kind]:,}", significant(steps[kind]))
        for kind, count in values.most_common()
    ]
    return Table(("stored as", "#tensors", "#numbers", "#tensors that differ", "#scales move a weight by, steps"), rows)


def _converted(found: ExportReport) -> list[Block]:
    if not found.converted:
        return []
    rows = list(found.converted.items())[:MOST_ROWS]
    left = len(found.converted) - len(rows)
    return [Table(("linear", "why"), rows), *([Paragraph(f"And {left} more.", "note")] if left else [])]
