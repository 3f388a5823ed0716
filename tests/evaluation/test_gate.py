"""The quality gate: limits are data, the worst text counts, a result that breaks one is kept and never published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmcompress.compressed_model import CompressedModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.gate import check_gate, judged
from llmcompress.evaluation.settings.gate import Gate
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.hub_upload import checked_artifacts
from llmcompress.pipeline import compress
from llmcompress.recipe import parse_recipe
from llmcompress.records.evaluation import Measured
from llmcompress.records.gate import GateResult, NotFinite
from tests.report.example import answers, divergence, estimate, generations
from tests.tiny_folder import write_tiny_llama

TEXT = PerplexityTask(source="builtin:evaluation", window=48, max_windows=2)


def gate(*measurements: object, **limits: object) -> GateResult:
    (found,) = judged([Gate.model_validate(limits)], measurements)  # type: ignore[arg-type]
    assert isinstance(found, GateResult)
    return found


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"kl_mean": 0.03}, True),
        ({"kl_mean": 0.01}, False),
        ({"perplexity_ratio": 1.02}, True),
        ({"perplexity_ratio": 1.01}, False),
        ({"flips": 0.02}, False),
        ({"flips": 0.03}, True),
        ({"repetition": 0.04}, False),
        ({"repetition": 0.05}, True),
        ({"finite": True}, True),
    ],
)
def test_a_limit_is_compared_with_the_estimate(limits: dict[str, object], kept: bool) -> None:
    assert gate(divergence(), answers(0.014, 0.007), generations("compressed"), **limits).kept is kept


def test_the_worst_of_several_texts_counts_and_is_named() -> None:
    found = gate(divergence(), divergence(text="books", kl=estimate(0.07)), kl_mean=0.05)
    assert not found.kept and found.limits[0].found == 0.07 and "kl_mean on books is 0.07" in found.broken


def test_without_tasks_flips_are_those_of_predicted_tokens() -> None:
    assert gate(divergence(), flips=0.5).limits[0].found == pytest.approx(0.02)


def test_a_number_that_is_none_breaks_the_gate() -> None:
    found = gate(NotFinite(metric="books", what="NaN"), finite=True, kl_mean=0.1)
    assert not found.kept and [each.name for each in found.limits] == ["finite"]


@pytest.mark.parametrize(
    ("settings", "compares", "said"),
    [
        ([Gate(kl_mean=0.1)], True, "nothing is measured"),
        ([Gate(repetition=0.1), TEXT], True, "nothing is measured"),
        ([Gate(kl_mean=0.1), TEXT], False, "compares with the dense model"),
    ],
)
def test_a_limit_of_what_is_not_measured_is_refused_before_the_work(
    settings: list[Gate | PerplexityTask], compares: bool, said: str
) -> None:
    with pytest.raises(CompressError, match=said) as refused:
        check_gate(settings, compares=compares)
    assert refused.value.exit_code is ExitCode.USAGE


def test_a_recipe_writes_it_without_a_list_and_a_wrong_key_is_told() -> None:
    text = "passes: [rtn]\nevaluate: {perplexity: [builtin:evaluation], gate: {kl_mean: 0.05}}"
    recipe = parse_recipe(text, "r", settings=["evaluate.gate.flips=0.03"])
    assert Gate(kl_mean=0.05, flips=0.03) in recipe.evaluate
    assert recipe.to_dict()["evaluate"]["gate"]["kl_mean"] == 0.05
    assert parse_recipe(recipe.to_yaml(), "again") == recipe
    with pytest.raises(CompressError, match="unknown option 'kl_men'") as refused:
        parse_recipe(text.replace("kl_mean", "kl_men"), "r")
    assert "`kl_mean`" in refused.value.fix


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> CompressedModel:
    folder = tmp_path_factory.mktemp("gate")
    evaluate = {"perplexity": [TEXT.model_dump(exclude_defaults=True)], "gate": {"kl_mean": 0.0, "finite": True}}
    recipe = {"passes": [{"rtn": {"scheme": "int4_g16"}}], "evaluate": evaluate}
    return compress(str(write_tiny_llama(folder / "tiny")), recipe, folder / "out")


def test_a_result_beyond_its_gate_is_saved_and_not_published(broken: CompressedModel) -> None:
    assert broken.folder is not None and (broken.folder / "model.safetensors").is_file()
    (found,) = broken.report.of_kind(GateResult)
    assert [each.kept for each in found.limits] == [True, False]


def test_its_folder_is_not_published(broken: CompressedModel) -> None:
    assert broken.folder is not None
    with pytest.raises(CompressError, match="the quality gate is not kept") as refused:
        checked_artifacts([broken.folder])
    assert refused.value.exit_code is ExitCode.GATE


def test_a_compressed_model_that_computes_nan_is_kept_where_the_gate_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompress.evaluation.metrics.perplexity import PerplexityMetric

    observe = PerplexityMetric.observe

    def fail_when_compressed(self, runner, progress, *, dense):  # type: ignore[no-untyped-def]
        if dense is not None:
            raise CompressError("numerics.not-finite", "the log-probability of a token is nan", where="window 1")
        return observe(self, runner, progress, dense=dense)

    monkeypatch.setattr(PerplexityMetric, "observe", fail_when_compressed)
    evaluate = {"perplexity": [TEXT.model_dump(exclude_defaults=True)], "gate": {"finite": True}}
    recipe = {"passes": [{"rtn": {"scheme": "int4_g16"}}], "evaluate": evaluate}
    made = compress(str(write_tiny_llama(tmp_path / "tiny")), recipe, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert [each.metric for each in made.report.of_kind(NotFinite)] == ["builtin:evaluation"]
    assert not made.report.of_kind(GateResult)[0].kept
    assert isinstance(made.report, Measured) and torch.isfinite(made.model.lm_head.weight).all()
