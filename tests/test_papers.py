"""Recipes of papers: valid for the models that they name, and they run on rows like those of the data set they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llmcompress
from llmcompress.elicitation.steps.label import Label
from llmcompress.elicitation.steps.read import Read
from llmcompress.exporters.loader import loader_of
from llmcompress.passes.distillation.distill import Distill
from llmcompress.passes.retraining import Retraining
from llmcompress.planning import check_recipe, within_target_limits
from llmcompress.presets import load_preset, paper_names
from llmcompress.recipe import Recipe, parse_recipe
from tests.hub_widths import config_of, hub_map
from tests.tiny_folder import write_tiny_llama

ALIKE = {
    "MiniLLM/init-gpt2-120M": "openai-community/gpt2",
    "facebook/opt-1.3b": "facebook/opt-125m",
    "huggyllama/llama-7b": "meta-llama/Llama-3.2-1B",
    "Qwen/Qwen2.5-1.5B-Instruct": "Qwen/Qwen2.5-1.5B",
    "Qwen/Qwen3-0.6B": "Qwen/Qwen3-0.6B",
}
"""The student of a recipe → a model of its family whose config the tests have."""
DOLLY = [
    {"instruction": "Name a ship.", "context": "", "response": "The Pequod.", "category": "open_qa"},
    {"instruction": "Who was he?", "context": "A man sat.", "response": "A sailor.", "category": "closed_qa"},
]


@pytest.mark.parametrize("name", paper_names())
def test_a_papers_recipe_is_planned_for_its_student(name: str) -> None:
    recipe = load_preset(name)
    assert recipe.model is not None and parse_recipe(recipe.to_yaml(), "again") == recipe
    alike = ALIKE[recipe.model]
    check_recipe(within_target_limits(recipe), hub_map(alike), loader_of(config_of(alike)), torch.bfloat16)
    for step in recipe.data:
        step.check()


def test_the_prompt_is_the_papers_with_and_without_a_context(tmp_path: Path) -> None:
    read = next(step for step in load_preset("papers/minillm-gpt2-125m").data if isinstance(step, Read))
    head = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    first, second = (read._row(dict(row)) for row in DOLLY)
    assert first["prompt"] == f"{head}\n\n### Instruction:\nName a ship.\n\n### Response:"
    assert second["prompt"] == f"{head}\n\n### Instruction:\nWho was he?\n\n### Input:\nA man sat.\n\n### Response:"
    assert second["response"] == "A sailor."


@pytest.mark.parametrize("name", paper_names())
def test_a_papers_recipe_runs_in_small(name: str, tmp_path: Path) -> None:
    """The objective, the way of writing and the schedule are the recipe's; models, rows and steps are few and small."""
    sizes = {"dtype": torch.float32, "max_position_embeddings": 512, "num_hidden_layers": 1, "hidden_size": 16}
    student, teacher = (write_tiny_llama(tmp_path / each, **sizes) for each in ("student", "teacher"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in DOLLY * 20))
    recipe = load_preset(name)

    def small(each: Any) -> Any:
        if isinstance(each, Read):
            return each.model_copy(update={"source": str(rows)})
        if isinstance(each, Label):
            return each.model_copy(update={"by": str(teacher), "tokens": 8})
        if isinstance(each, Retraining):
            few = {"steps": 2, "batch": 2, "gradient_accumulation": 1, "mixed_precision": None}
            change: dict[str, Any] = {"training": each.training.model_copy(update=few)}
            if isinstance(each, Distill):
                assert each.on_policy is not None
                change |= {"teacher": str(teacher), "on_policy": each.on_policy.model_copy(update={"tokens": 4})}
            return each.model_copy(update=change)
        return each

    found = recipe.model_copy(
        update={
            "model": str(student), "evaluate": (), "data": tuple(map(small, recipe.data)),
            "passes": tuple(map(small, recipe.passes)),
        }
    )  # fmt: skip
    assert isinstance(found, Recipe)
    made = llmcompress.compress(None, found)
    assert any(row.algorithm == "distill" for row in made.report.sites)
    assert all(bool(torch.isfinite(each).all()) for each in made.model.parameters())
