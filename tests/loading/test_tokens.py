"""A tokenizer with more tokens than the embedding has rows is of use until a text has one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcompress import compress, evaluate
from llmcompress.errors import CompressError
from llmcompress.recipe import parse_recipe
from tests.tiny_folder import SENTENCE, with_a_far_token, write_tiny_llama

GPTQ = "passes: [gptq: {scheme: int4_g16}]\ncalibration: {source: TEXT, samples: 2, tokens: 16, min_tokens: 1}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_llama(tmp_path_factory.mktemp("far") / "model")
    with_a_far_token(folder)
    return folder


def text(path: Path, *, far: bool) -> Path:
    path.write_text(" ".join([SENTENCE] * 20) + (" <far>" if far else "") + SENTENCE)
    return path


@pytest.mark.parametrize("where", ["calibration", "evaluation"])
def test_a_text_with_a_token_beyond_the_embedding_is_refused_by_name(folder, tmp_path, where):
    far, near = text(tmp_path / "far.txt", far=True), text(tmp_path / "near.txt", far=False)
    calibration, evaluation = (far, near) if where == "calibration" else (near, far)
    written = GPTQ.replace("TEXT", str(calibration)).replace("samples: 2", "samples: 400")
    recipe = parse_recipe(f"{written}evaluate: {{perplexity: ['{evaluation}']}}", "r")
    with pytest.raises(CompressError) as caught:
        compress(str(folder), recipe, tmp_path / "out", device="cpu")
    error = caught.value
    assert error.code == "model.vocabulary" and "288 rows" in error.what
    assert "'<far>' = 300" in error.where and "far.txt" in error.where and "resize_token_embeddings(301)" in error.fix
    assert not (tmp_path / "out").exists()


def test_a_text_without_such_tokens_is_compressed_and_measured(folder, tmp_path):
    near = text(tmp_path / "near.txt", far=False)
    recipe = parse_recipe(f"{GPTQ.replace('TEXT', str(near))}evaluate: {{perplexity: ['{near}']}}", "r")
    report = compress(str(folder), recipe, tmp_path / "out", device="cpu").report
    assert any("13 tokens of the tokenizer have none" in warning for warning in report.warnings)
    assert evaluate(str(tmp_path / "out"), recipe.evaluate, device="cpu").perplexities[0].perplexity > 1


def test_evaluating_a_text_with_such_a_token_is_refused_too(folder, tmp_path):
    far = text(tmp_path / "far.txt", far=True)
    tasks = parse_recipe(f"passes: [rtn]\nevaluate: {{perplexity: ['{far}']}}", "r").evaluate
    with pytest.raises(CompressError, match=r"model\.vocabulary"):
        evaluate(str(folder), tasks, device="cpu")
