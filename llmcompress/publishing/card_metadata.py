"""The front matter of a model card: what the Hub's search, model tree and result tables read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmcompress.calibration.hub_datasets import ALIASES
from llmcompress.errors import CompressError
from llmcompress.modules.scheme import named_scheme
from llmcompress.publishing.base_model import BaseModel
from llmcompress.publishing.outgoing import Artifact
from llmcompress.records.evaluation import Evaluation
from llmcompress.records.export_report import ExportReport
from llmcompress.records.measurements import PerplexityResult
from llmcompress.records.rows import SiteReport
from llmcompress.records.tasks import TaskResult

LIBRARY = {
    "llmcompress": "llmcompress",
    "archive": "llmcompress",
    "gguf": "gguf",
    "onnx": "onnx",
    "openvino": "openvino",
}
"""Format or target → `library_name`, where that is not transformers."""


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card is written from; no name in it is a path."""

    repository: str
    base: BaseModel
    evaluation: Evaluation
    """Measurements of the model, against the dense one where both were measured."""
    recipe: dict[str, Any]
    """As published; empty where there is none."""
    recipe_text: str
    artifacts: Sequence[Artifact]
    formats: Sequence[str]
    """Of each artifact: the target of an export, or `plain` or the `quant_method` of a Hugging Face folder."""
    exports: Sequence[ExportReport | None]
    """Of each artifact."""
    needs_chat: bool
    """Whether the tokenizer has a chat template."""

    @property
    def name(self) -> str:
        """Of the model."""
        return self.repository.partition("/")[2]

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """What was done to every linear."""
        return self.evaluation.compression.sites if self.evaluation.compression else ()

    @property
    def passes(self) -> list[str]:
        """Names of the recipe's passes, in order."""
        return [name for each in self.recipe.get("passes") or () for name in each]


def metadata(facts: CardFacts) -> dict[str, Any]:
    """The front matter as data."""
    from huggingface_hub import ModelCardData

    dense_id, bits = facts.base.id, _bits(facts.sites)
    relation = "quantized" if bits or "gguf" in facts.formats else "finetune"
    tags = ["llmcompress", *facts.formats, *facts.passes, *([f"{bits}-bit"] if bits else [])]
    if facts.needs_chat:
        tags.append("conversational")
    results = list(_results(facts.evaluation))
    card = ModelCardData(
        base_model=dense_id,
        base_model_relation=relation if dense_id else None,
        library_name=LIBRARY.get(facts.formats[0], "transformers"),
        pipeline_tag="text-generation",
        datasets=_datasets(facts) or None,
        tags=[tag for tag in dict.fromkeys(tags) if tag != "plain"],
        model_name=facts.name if results else None,
        eval_results=results or None,
        **facts.base.inherited,
    )
    found: dict[str, Any] = card.to_dict()  # type: ignore[no-untyped-call]
    return {key: value for key, value in found.items() if value is not None}


def _bits(sites: Sequence[SiteReport]) -> str:
    """Of the codes of most linears; empty where none holds codes."""
    found = Counter[str]()
    for scheme in {row.site: row.scheme for row in sites}.values():
        if scheme:
            try:
                found[str(round(float(named_scheme(scheme).weights.own_bits)))] += 1
            except CompressError:  # a scheme of another version
                continue
    return found.most_common(1)[0][0] if found else ""


def _datasets(facts: CardFacts) -> list[str]:
    """The calibration text, if it is a dataset of the Hub."""
    source = str((facts.recipe.get("calibration") or {}).get("source", ""))
    made = facts.evaluation.compression
    if made is None or not made.calibration_tokens:
        return []
    if source in ALIASES:
        return [ALIASES[source].path]
    is_id = source.count("/") == 1 and not source.startswith((".", "/", "~")) and "." not in source.partition("/")[2]
    return [source] if is_id else []


def _results(found: Evaluation) -> Iterator[Any]:
    """Perplexities and main scores of tasks, for `model-index`."""
    from huggingface_hub import EvalResult

    for each in found.of_kind(PerplexityResult):
        if each.of == "dense":
            continue
        name, _, split = each.text.partition(":")
        alias = ALIASES.get(name)
        yield EvalResult(
            task_type="text-generation",
            dataset_type=alias.path if alias else name,
            dataset_name=each.text,
            dataset_config=alias.config if alias else None,
            dataset_split=(split or None) if alias else None,
            metric_type="perplexity",
            metric_name=f"perplexity (window {each.window}, {'' if each.bos else 'no '}BOS, {each.tokens} tokens)",
            metric_value=round(each.perplexity, 4),
        )
    for task in found.of_kind(TaskResult):
        if task.of != "dense":
            yield EvalResult(
                task_type="text-generation",
                dataset_type=task.task,
                dataset_name=task.task,
                metric_type=task.main,
                metric_name=f"{task.main} ({task.documents} documents, {task.shots} shots)",
                metric_value=round(task.main_score.value, 4),
            )
