"""Scores of whole benchmarks become `.eval_results/*.yaml` as the Hub documents them; parts of one never do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmcompress import verify
from llmcompress.compressed_model import CompressedModel
from llmcompress.hub_upload import push
from llmcompress.publishing.benchmarks import whole_splits
from llmcompress.publishing.destinations import HubRepository
from llmcompress.records.evaluation import Evaluation
from llmcompress.records.tasks import TaskDataset, TaskResult, TaskScore
from llmcompress.report.folder import write_report
from tests.hub.server import HubDouble

NAME = "me/tiny-w4"
GSM8K = TaskDataset(path="openai/gsm8k", config="main", split="test", rows=1319)
MMLU_PRO = TaskDataset(path="TIGER-Lab/MMLU-Pro", config="default", split="test", rows=12032)
DEFINITION = b"""name: Grade School Math
evaluation_framework: inspect-ai
tasks:
  - {id: gsm8k_train, config: main, split: train}
  - {id: gsm8k, config: main, split: test}
"""


def measured(value: float, dataset: TaskDataset | None, **changes: Any) -> TaskResult:
    facts = {"task": "gsm8k", "version": "3.0", "shots": 5, "chat_template": False, "limit": None, "of": "compressed"}
    main = changes.pop("main", "exact_match,strict-match")
    score = TaskScore(metric=main, value=value, standard_error=0.01, higher_is_better=True)
    documents = changes.pop("documents", dataset.rows if dataset else 10)
    return TaskResult.model_validate(
        {**facts, "documents": documents, "dataset": dataset, "main": main, "scores": (score,), **changes}
    )


def report_of(folder: Path, *results: TaskResult) -> Path:
    found = Evaluation(model="m", runner="torch", versions={}, machine={"cpu": "c"}, measurements=results)
    return write_report(found, folder)


def scores_in(files: dict[str, bytes]) -> dict[str, Any]:
    return {name: yaml.safe_load(text) for name, text in files.items() if name.startswith(".eval_results/")}


def test_a_score_of_a_benchmark_is_an_entry_that_the_hub_reads(
    hub: HubDouble, made: CompressedModel, tmp_path: Path
) -> None:
    hub.add("datasets/openai/gsm8k", {"eval.yaml": DEFINITION})
    assert made.folder is not None
    report = report_of(tmp_path / "report", measured(0.27672, GSM8K), measured(0.31, GSM8K, of="dense"))
    push([made.folder], HubRepository(repository=NAME), report=report)
    assert scores_in(hub.repos[NAME].files) == {
        ".eval_results/gsm8k.yaml": [
            {
                "dataset": {"id": "openai/gsm8k", "task_id": "gsm8k"},
                "value": 27.67,
                "source": {"url": "https://huggingface.co/me/tiny-w4", "name": "Model card"},
                "notes": "exact_match,strict-match, 5 shots, no chat template, lm-eval gsm8k version 3.0",
            }
        ]
    }
    assert not verify(NAME).failed and b"model-index" in hub.repos[NAME].files["README.md"]
    push([made.folder], HubRepository(repository=NAME))
    assert not scores_in(hub.repos[NAME].files), "what is measured no more is shown no more"


@pytest.mark.parametrize(
    "definition", [None, b"name: x\n", b"tasks: [{id: a, config: other}]", b"- 1", b"a: [", b"\xff"]
)
def test_a_dataset_that_is_no_benchmark_gets_no_entry(
    hub: HubDouble, made: CompressedModel, tmp_path: Path, definition: bytes | None
) -> None:
    if definition is not None:
        hub.add("datasets/openai/gsm8k", {"eval.yaml": definition})
    assert made.folder is not None
    push([made.folder], HubRepository(repository=NAME), report=report_of(tmp_path / "report", measured(0.5, GSM8K)))
    assert not scores_in(hub.repos[NAME].files)


def test_a_gated_benchmark_stops_no_push(hub: HubDouble, made: CompressedModel, tmp_path: Path) -> None:
    hub.fail("HEAD", "datasets/openai/gsm8k", 403, message="ask for access", X_Error_Code="GatedRepo")
    assert made.folder is not None
    push([made.folder], HubRepository(repository=NAME), report=report_of(tmp_path / "report", measured(0.5, GSM8K)))
    assert not scores_in(hub.repos[NAME].files)


@pytest.mark.parametrize(
    "result",
    [
        measured(0.5, None),
        measured(0.5, GSM8K, documents=100, limit=100),
        measured(0.5, GSM8K, documents=100),
        measured(0.5, GSM8K, of="dense"),
        measured(12.5, GSM8K, main="perplexity"),
    ],
    ids=["of a file", "limited", "of a part", "of the dense model", "no percentage"],
)
def test_what_is_no_score_of_the_whole_benchmark_is_left_out(result: TaskResult) -> None:
    assert not list(whole_splits([result]))


def test_subjects_that_make_up_a_split_are_one_score() -> None:
    sizes = {"mmlu_pro_biology": (717, 0.5), "mmlu_pro_law": (1101, 0.25), "mmlu_pro_other": (10214, 0.125)}
    subjects = [
        measured(value, MMLU_PRO, task=task, documents=count, main="exact_match,custom-extract")
        for task, (count, value) in sizes.items()
    ]
    (found,) = whole_splits(subjects)
    right = sum(count * value for count, value in sizes.values())
    assert found.name == "mmlu_pro" and found.value == pytest.approx(right / 12032)
    assert not list(whole_splits(subjects[:2])), "two subjects are not the benchmark"
    assert not list(whole_splits([*subjects[:2], subjects[2].model_copy(update={"shots": 0})])), "another protocol"
