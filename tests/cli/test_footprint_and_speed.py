"""The two commands that measure a saved model without a text."""

from __future__ import annotations

import json
import re

import pytest
from llmcompress.evaluation.speed import SpeedResult

from llmcompress import pipeline
from llmcompress.cli.main import main
from llmcompress.errors import ExitCode
from tests.tiny_text import tiny_llama

BOOKS = "builtin:books-llama"


@pytest.fixture
def run(capsys):
    """Run a command: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        written = capsys.readouterr()
        return exit_.value.code, written.out, written.err

    return call


def test_footprint_shows_what_is_stored_and_apart_from_it_what_is_theory(run):
    code, out, _ = run("footprint", BOOKS)
    assert code == 0
    assert re.search(r"parameters +2,422,848", out) and re.search(r"embedding +393,216", out)
    assert re.search(r"weight files +4\.9 MB", out)
    assert out.index("in theory: no file here is stored so") < out.index("Huffman's code")
    found = json.loads(run("footprint", BOOKS, "--json")[1])
    assert found["parameters"] == found["embedding"] + found["head"] + found["blocks"] + found["other"]


def test_footprint_against_another_model_gives_ratios(run, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    code, out, _ = run("footprint", str(tmp_path), "--against", BOOKS)
    parameters = int(re.search(r"parameters +([\d,]+)", out)[1].replace(",", ""))
    assert code == 0 and re.search(rf"2,422,848 +{parameters / 2_422_848:.3f}", out)
    found = json.loads(run("footprint", str(tmp_path), "--against", BOOKS, "--json")[1])
    assert found["ratios"]["parameters"] == pytest.approx(parameters / 2_422_848)
    assert (found["model"]["model"], found["against"]["model"]) == (str(tmp_path), BOOKS)


def test_a_model_that_is_not_there_is_told_in_words(run):
    code, out, _ = run("footprint", "builtin:none", "--json")
    assert code == json.loads(out)["error"]["exit_code"] == ExitCode.USAGE


def result(decode: float) -> SpeedResult:
    return SpeedResult(
        device="cpu", threads=2, dtype="float32", prompt_tokens=9, new_tokens=4, repeats=3,
        prefill_tokens_per_second=100.0, prefill_spread=0.1, decode_tokens_per_second=decode, decode_spread=0.2,
        seconds_to_first_token=0.09, prefill_rates=(100.0, 95.0, 105.0), decode_rates=(decode, decode, 1.2 * decode),
    )  # fmt: skip


def test_speed_passes_its_options_on_and_shows_ratios_to_the_first(run, monkeypatch):
    calls = []

    def speed(models, **options):
        calls.append((models, options))
        return {name: result(20.0 * (number + 1)) for number, name in enumerate(models)}

    monkeypatch.setattr(pipeline, "speed", speed)
    code, out, _ = run("speed", "a", "b", "--prompt-tokens", "9", "--new-tokens", "4", "--repeats", "3")
    assert code == 0
    assert calls == [
        (("a", "b"), {"device": "auto", "dtype": "auto", "prompt_tokens": 9, "new_tokens": 4, "repeats": 3})
    ]
    assert "cpu, 2 threads, float32: prompt of 9 tokens, 4 new, median of 3" in out
    assert re.search(r"b +100\.0 ±5% +40\.0 ±10% +90 ms", out)
    assert re.search(r"times as fast as a *\n.*\nb +1\.00 \(1\.00 to 1\.00\) +2\.00 \(2\.00 to 2\.00\)", out)
    assert json.loads(run("speed", "a", "--json")[1])["a"] == result(20.0).model_dump(mode="json")


def test_speed_against_another_model_gives_ratios_turn_by_turn(run, monkeypatch):
    slow, fast = result(20.0), result(40.0).model_copy(update={"decode_rates": (30.0, 40.0, 72.0)})
    monkeypatch.setattr(pipeline, "speed", lambda models, **options: dict(zip(models, (fast, slow), strict=True)))
    assert "times as fast as old" in run("speed", "new", "--against", "old")[1]
    found = json.loads(run("speed", "new", "--against", "old", "--json")[1])
    assert found["against"] == "old" and set(found["models"]) == {"new", "old"}
    # by turn: 30 / 20, 40 / 20, 72 / 24
    assert found["ratios"]["new"]["decode"] == {"median": 2.0, "lowest": 1.5, "highest": pytest.approx(3.0)}


def test_speed_really_measures_a_model_by_its_name(run):
    out = run(
        "speed", BOOKS, "--prompt-tokens", "3", "--new-tokens", "2", "--repeats", "1", "--device", "cpu", "--json"
    )[1]
    assert json.loads(out)[BOOKS]["decode_tokens_per_second"] > 0


@pytest.mark.parametrize("arguments", [["speed"], ["speed", "m", "--new-tokens", "1"], ["footprint"]])
def test_a_wrong_command_line_starts_nothing(run, arguments):
    assert run(*arguments)[0] == ExitCode.USAGE
