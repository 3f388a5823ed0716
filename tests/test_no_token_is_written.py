"""An access token in a model's name or a recipe's value reaches no screen and no file, wherever it is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmcompress import CompressError, compress
from llmcompress.cli.main import main
from llmcompress.errors import without_tokens
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe
from tests.tiny_folder import write_tiny_llama

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
PASSWORD = "correcthorse"
URL = f"https://user:{PASSWORD}{TOKEN}@huggingface.co/org/name"


@pytest.mark.parametrize("text", [f"a {TOKEN}.", URL, f'{{"url": "{URL}"}}', f"x={TOKEN}&y", f"https://{TOKEN}@h.co"])
def test_tokens_and_passwords_become_stars(text: str) -> None:
    found = without_tokens(text)
    assert "***" in found and TOKEN not in found and PASSWORD not in found


@pytest.mark.parametrize("text", ["hf_quant_config.json", "hf_transfer", "https://huggingface.co/a@b", "user@host"])
def test_ordinary_names_stay(text: str) -> None:
    assert without_tokens(text) == text


def test_an_error_holds_no_token_whoever_shows_it() -> None:
    error = CompressError("a.b", TOKEN, where=URL, fix=TOKEN, saved=TOKEN)
    assert TOKEN not in str(error) + repr(error) + json.dumps(error.as_dict())


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("arguments", [[URL], ["builtin:books-llama", "--set", f"calibration.source=./{TOKEN}.txt"]])
def test_a_failing_command_shows_no_token(
    arguments: list[str], as_json: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(
            ["compress", *arguments, "--preset", "tiny/gptq", "-o", str(tmp_path / "out")]
            + ["--json"] * as_json
        )  # fmt: skip
    written = capsys.readouterr()
    shown = written.out + written.err
    assert ended.value.code not in (0, 1) and "***" in shown and TOKEN not in shown and PASSWORD not in shown
    assert not as_json or json.loads(written.out)["error"]["code"]


def test_a_token_in_a_recipe_is_in_no_file_of_the_run_or_the_result(tmp_path: Path) -> None:
    model, texts = write_tiny_llama(tmp_path / "model"), tmp_path / f"{TOKEN}.txt"
    texts.write_text("the quick brown fox jumps over the lazy dog " * 200)
    recipe = parse_recipe(
        f"calibration: {{source: '{texts}', samples: 4, tokens: 32}}\npasses: [{{gptq: {{scheme: int8_channel}}}}]\n"
        "evaluate: {perplexity: []}",
        "test",
    )
    written: dict[str, str] = {}

    class Reading(Silent):
        def step(self, text: str) -> None:
            for file in tmp_path.rglob("*"):
                if file.suffix in (".yaml", ".json", ".jsonl"):
                    written[str(file.relative_to(tmp_path))] = file.read_text()
            if text.startswith("layers.1") or "2/2" in text:
                raise CompressError("test.stop", f"stopped at {TOKEN}")

    with pytest.raises(CompressError):
        compress(str(model), recipe, tmp_path / "out", progress=Reading())
    compress(str(model), recipe, tmp_path / "out2")
    for folder in (tmp_path / "out.run", tmp_path / "out2"):
        for file in folder.rglob("*"):
            if file.is_file() and file.suffix in (".yaml", ".json", ".jsonl"):
                written[str(file.relative_to(tmp_path))] = file.read_text()
    assert {"out.run/lock.yaml", "out.run/log.jsonl", "out2/llmcompress_recipe.yaml"} <= written.keys()
    assert not [name for name, text in written.items() if TOKEN in text]
