"""Tasks, robustness and generations as metrics: of a model alone, beside another one, and kept for the next time."""

from __future__ import annotations

import pytest
import torch

import llmcompress
from llmcompress.errors import CompressError
from llmcompress.evaluation.metrics.base import Observation, Subject
from llmcompress.evaluation.metrics.generations import GenerationMetric
from llmcompress.evaluation.metrics.robustness import RobustnessMetric
from llmcompress.evaluation.metrics.tasks import TaskMetric
from llmcompress.evaluation.settings.generations import GenerationSettings
from llmcompress.evaluation.settings.robustness import RobustnessSettings
from llmcompress.evaluation.settings.tasks import TaskSettings
from llmcompress.progress import Silent
from llmcompress.recipe import Recipe
from llmcompress.records import tasks as records
from llmcompress.runners.torch_runner import TorchRunner
from tests.tiny_text import byte_tokenizer, tiny_llama

SUBJECT = Subject(byte_tokenizer(), 64, 259)


def observed(metric, *, seed: int = 0) -> Observation:
    """What it sees, as it comes back from the cache."""
    with TorchRunner(tiny_llama(seed=seed)) as runner:
        seen = metric.observe(runner, Silent(), dense=None)
    return Observation.from_stored(seen.stored(), from_cache=True)


def test_answers_of_two_models_are_paired_by_document():
    (metric,) = TaskMetric.prepare([TaskSettings(task="builtin_word_order", limit=12)], SUBJECT)
    dense, own = observed(metric), observed(metric, seed=1)
    (result,), (comparison,) = metric.results(own, "compressed"), metric.compared(dense, own)
    assert isinstance(result, records.TaskResult) and isinstance(comparison, records.TaskComparison)
    assert (result.documents, result.main, result.of) == (12, "acc", "compressed")
    assert comparison.compressed == result.main_score.value
    assert comparison.change.mean == pytest.approx(comparison.wrong_to_right.mean - comparison.right_to_wrong.mean)
    assert comparison.margin_change.count == 12
    (same,) = metric.compared(own, own)
    assert (same.flips, same.margin_change.mean) == (0, 0)


def test_random_numbers_of_the_caller_are_left_alone():
    (metric,) = TaskMetric.prepare([TaskSettings(task="builtin_word_order", limit=2)], SUBJECT)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    observed_by = metric.observe
    with TorchRunner(tiny_llama()) as runner:
        torch.manual_seed(5)
        observed_by(runner, Silent(), dense=None)
        assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("change", [{"limit": 3}, {"shots": 1}])
def test_what_is_asked_differently_is_kept_apart(change):
    base = {"task": "builtin_word_order", "limit": 2}
    metrics = TaskMetric.prepare(
        [TaskSettings(**base), TaskSettings(**base), TaskSettings(**{**base, **change})], SUBJECT
    )
    one, same, other = (each.fingerprint for each in metrics)
    assert one == same != other


def test_a_chat_template_that_is_not_there_is_refused_before_any_work():
    with pytest.raises(CompressError, match="no chat template"):
        TaskMetric.prepare([TaskSettings(task="builtin_word_order", chat_template=True)], SUBJECT)
    with pytest.raises(CompressError, match="no chat template"):
        GenerationMetric.prepare([GenerationSettings(chat_template=True)], SUBJECT)


def test_robustness_of_a_task_is_what_its_disturbed_prompts_cost():
    settings = RobustnessSettings(task="builtin_word_order", limit=8, noise=(0.1,), prompts=("short", "announced"))
    (metric,) = RobustnessMetric.prepare([settings], SUBJECT)
    dense, own = observed(metric), observed(metric, seed=1)
    results, comparisons = metric.results(own, "compressed"), metric.compared(dense, own)
    # `short` has no rule for prompts that are no questions
    assert [each.disturbance for each in results] == ["noise:0.1", "prompt:announced"]
    for before, result, found in zip(metric.results(dense, "dense"), results, comparisons, strict=True):
        assert result.loss.mean == pytest.approx(result.clean - result.disturbed)
        assert found.extra_loss.mean == pytest.approx(result.loss.mean - before.loss.mean)
        assert found.extra_loss.count == 8


def test_robustness_of_a_text_is_its_loss_per_byte_of_the_same_windows():
    (metric,) = RobustnessMetric.prepare([RobustnessSettings(text="builtin:evaluation", limit=4)], SUBJECT)
    dense, own = observed(metric), observed(metric, seed=1)
    (result,), (found,) = metric.results(own, "model"), metric.compared(dense, own)
    assert (result.metric, result.disturbance, result.loss.count) == ("nats_per_byte", "noise:0.05", 4)
    assert result.loss.mean == pytest.approx(result.disturbed - result.clean)
    assert found.extra_loss.mean == pytest.approx(found.compressed_loss - found.dense_loss)
    assert [text.name for text in metric.texts] == ["builtin:evaluation"]


def test_reports_name_task_files_and_never_their_folders():
    assert (TaskSettings(task="/home/me/mine.yaml").name, TaskSettings(task="arc_easy").name) == ("mine", "arc_easy")


@pytest.mark.parametrize("options", [{}, {"task": "a", "text": "b"}])
def test_robustness_is_of_one_task_or_one_text(options):
    with pytest.raises(ValueError, match="either"):
        RobustnessSettings(**options)


def test_generations_of_two_models_stand_side_by_side():
    (metric,) = GenerationMetric.prepare([GenerationSettings(limit=9, max_new_tokens=12)], SUBJECT)
    dense, own = observed(metric), observed(metric, seed=1)
    (result,), (found,) = metric.results(own, "compressed"), metric.compared(dense, own)
    assert isinstance(result, records.GenerationsResult) and isinstance(found, records.GenerationComparison)
    assert [pair.compressed for pair in found.pairs] == [text.text for text in result.texts]
    assert result.followed.count == 2 and found.followed_change.count == 2
    assert all(text.tokens <= 12 and text.ended == (text.tokens < 12) for text in result.texts)
    assert found.rouge_l.mean < 1 and found.same.count == 9
    (same,) = metric.compared(own, own)
    assert (same.rouge_l.mean, same.same.mean, same.tokens_change.mean) == (1, 1, 0)


def test_a_recipe_and_the_public_function_take_all_of_them():
    written = {
        "evaluate": {
            "tasks": ["builtin_word_order", {"task": "local_piqa", "data": "there", "limit": 5}],
            "robustness": ["builtin:evaluation", "builtin_word_order"],
            "generations": ["builtin:prompts"],
        },
        "passes": ["rtn"],
    }
    settings = Recipe.from_dict(written).evaluate
    assert [getattr(each, "task", None) for each in settings] == [
        "builtin_word_order",
        "local_piqa",
        None,
        "builtin_word_order",
        None,
    ]
    asked = [GenerationSettings(limit=1, max_new_tokens=2), TaskSettings(task="builtin_word_order", limit=1)]
    found = llmcompress.evaluate(tiny_llama(), asked, tokenizer=byte_tokenizer())
    assert [each.kind for each in found.measurements] == ["generations", "task"]
    again = type(found).model_validate_json(found.model_dump_json())
    assert again == found
