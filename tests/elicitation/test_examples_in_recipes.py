"""`data:` in a recipe: made before the passes, kept in the run folder, learned from in place of other text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llmcompress
from llmcompress.calibration.context import ExampleRows
from llmcompress.errors import CompressError
from llmcompress.progress import Silent
from llmcompress.recipe import Recipe
from llmcompress.training.data.examples import samples_of_rows
from tests.tiny_folder import write_tiny_llama

LABEL: list[dict[str, Any]] = [
    {"prompts": {"texts": ["the fox", "the dog", "a model"]}},
    {"label": {"tokens": 8, "batch": 1}},
]


def recipe(data: list[Any], *passes: Any, **options: Any) -> dict[str, Any]:
    learned = [{"distill": {"training": {"steps": 2, "batch": 2}}}]
    return {
        "calibration": {"samples": 4, "tokens": 24}, "data": data, "passes": list(passes) or learned, "evaluate": {},
        "guard": {"windows": 0}, **options,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "m", dtype=torch.float32, max_position_embeddings=256)


class Killed(Exception):
    pass


class Dying(Silent):
    def __init__(self, when: str) -> None:
        self._when = when

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        if self._when in f"{text} {done}":
            raise Killed


def test_a_run_killed_while_examples_are_made_resumes_to_the_same_weights(folder: Path, tmp_path: Path) -> None:
    asked = recipe(LABEL, {"random": {"sparsity": 0.3}}, {"distill": {"training": {"steps": 2, "batch": 2}}})
    through = llmcompress.compress(str(folder), asked, tmp_path / "through")
    with pytest.raises(Killed):
        llmcompress.compress(str(folder), asked, tmp_path / "out", progress=Dying("data, label: 2 rows 2"))
    file = tmp_path / "out.run" / "work" / "data" / "01-label.jsonl"
    before = file.read_text()
    assert len(before.splitlines()) == 2
    assert "data steps" in (tmp_path / "out.run" / "log.jsonl").read_text()
    again = llmcompress.compress(str(folder), asked, tmp_path / "out")
    assert not (tmp_path / "out.run").exists()
    pairs = zip(through.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_passes_learn_from_the_examples_and_not_from_the_calibration_text(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    made = llmcompress.compress(str(folder), recipe([*LABEL, {"write": {"file": str(kept)}}]))
    other = llmcompress.compress(str(folder), recipe([{"read": {"source": str(kept)}}]))
    plain = llmcompress.compress(str(folder), recipe([]))

    def same(one: Any, two: Any) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))

    assert same(made, other) and not same(made, plain)


def test_only_what_is_answered_is_learned() -> None:
    from transformers import PreTrainedTokenizerFast

    from tests.tiny_folder import tiny_tokenizer

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), bos_token="<s>", eos_token="</s>")
    for name in ("response", "chosen"):
        rows = [{"prompt": "the fox", name: " jumps", "extra": 1}, {"prompt": "a", name: " dog", "extra": 2}]
        sample = samples_of_rows(ExampleRows(rows, tokenizer, 32)).sample(0)
        assert sample.learned_T is not None
        assert tokenizer.decode(sample.ids_T[sample.learned_T]) == " jumps</s>"
    packed = samples_of_rows(ExampleRows([{"text": "the quick brown fox jumps over the lazy dog"}], tokenizer, 4))
    assert packed.longest == 4 and packed.count > 1
    with pytest.raises(CompressError) as caught:
        samples_of_rows(ExampleRows([{"text": "a"}, {"prompt": "b"}], tokenizer, 8))
    assert caught.value.code == "data.columns"


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (recipe([{"read": {"source": "none.jsonl"}}]), "data.not-found"),
        (recipe([{"retrieve": {"source": "none.txt"}}]), "data.not-found"),
        (recipe([{"generate": {"by": "./none"}}]), "model.no-folder"),
        (recipe(LABEL, {"rtn": {"scheme": "int4_g16"}}), "data.unused"),
        (recipe([{"generate": {"tokens": 4, "count": 2}}, {"filter_perplexity": {"highest": 1.001}}]), "data.empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_with_its_reason(folder: Path, asked: dict[str, Any], code: str) -> None:
    with pytest.raises(CompressError) as caught:
        llmcompress.compress(str(folder), asked)
    assert caught.value.code == code


def test_steps_are_written_and_hashed_like_passes() -> None:
    one = Recipe.from_dict(recipe(LABEL))
    assert Recipe.from_yaml(one.to_yaml()) == one and one.hash() != Recipe.from_dict(recipe(LABEL[:1])).hash()
    assert json.loads(one.to_json())["data"][1]["label"]["tokens"] == 8
    with pytest.raises(CompressError) as caught:
        Recipe.from_dict(recipe([{"lable": {}}]))
    assert caught.value.code == "recipe.unknown-step" and "`label`" in caught.value.fix
