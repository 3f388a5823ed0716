"""The training script writes a folder that loads anywhere, and a killed run ends where an unbroken one does."""

import importlib.util
import json
import lzma
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner, Result
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_tiny_model.py"
TINY = [
    "--hidden",
    "32",
    "--layers",
    "2",
    "--ffn",
    "64",
    "--heads",
    "4",
    "--kv-heads",
    "2",
    "--vocab",
    "300",
    "--window",
    "32",
    "--batch",
    "2",
]


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny_model", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    words = ["the", "ferry", "crossed", "a", "river", "slowly", "and", "nobody", "looked", "back"]
    text = " ".join(random.Random(0).choices(words, k=4000))
    path = tmp_path / "text.txt"
    path.write_text(text)
    return path


def train(script: ModuleType, text: Path, output: Path, *options: str) -> Result:
    return CliRunner().invoke(script.main, [str(text), "--output", str(output), *TINY, *options])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_the_folder_loads_and_generates(script, text_file, tmp_path):
    result = train(script, text_file, tmp_path / "model", "--steps", "3")
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    inputs = tokenizer("the ferry crossed", return_tensors="pt")
    assert inputs.input_ids[0, 0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.decode(inputs.input_ids[0], skip_special_tokens=True) == "the ferry crossed"
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] <= inputs.input_ids.shape[1] + 4


def test_config_speaks_to_both_transformers_majors(script, text_file, tmp_path):
    train(script, text_file, tmp_path / "model", "--steps", "1")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_training_lowers_the_held_out_perplexity_the_card_states(script, text_file, tmp_path):
    stated = []
    for steps in ("1", "60"):
        assert train(script, text_file, tmp_path / steps, "--steps", steps).exit_code == 0
        facts = json.loads((tmp_path / steps / "training.json").read_text())
        stated.append(facts["held_out_perplexity"])
        assert f"**{stated[-1]:.2f}**" in (tmp_path / steps / "README.md").read_text()
    assert stated[1] < stated[0] / 2


def test_a_killed_and_resumed_run_ends_where_an_unbroken_one_does(script, text_file, tmp_path, monkeypatch):
    assert train(script, text_file, tmp_path / "unbroken", "--steps", "6").exit_code == 0

    windows_of = script.training_windows

    def die_at_step_four(*arguments):
        if arguments[-1] == 4:
            raise KeyboardInterrupt
        return windows_of(*arguments)

    monkeypatch.setattr(script, "training_windows", die_at_step_four)
    killed = train(script, text_file, tmp_path / "killed", "--steps", "6", "--save-minutes", "0")
    assert killed.exit_code != 0 and not (tmp_path / "killed" / "README.md").exists()

    monkeypatch.setattr(script, "training_windows", windows_of)
    assert train(script, text_file, tmp_path / "killed", "--steps", "6", "--resume").exit_code == 0
    facts = json.loads((tmp_path / "killed" / "training.json").read_text())
    assert facts["steps"] == 6 and facts["tokens"] == 6 * 2 * 32
    assert_close(weights(tmp_path / "killed"), weights(tmp_path / "unbroken"))


def test_init_starts_from_the_weights_and_tokenizer_of_another_model(script, text_file, tmp_path):
    train(script, text_file, tmp_path / "first", "--steps", "2")
    options = ["--steps", "1", "--rate", "0", "--init", str(tmp_path / "first")]
    result = train(script, text_file, tmp_path / "second", *options)
    assert result.exit_code == 0, result.output
    assert_close(weights(tmp_path / "second"), weights(tmp_path / "first"), rtol=0, atol=0)
    assert (tmp_path / "second" / "tokenizer.json").read_text() == (tmp_path / "first" / "tokenizer.json").read_text()


def test_the_same_text_reads_the_same_from_txt_xz_and_jsonl(script, tmp_path):
    text = "One line.\nA separator\u2028inside, and an umlaut: \u00fc."
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in ("a.txt", "a.txt.xz", "a.jsonl"):
        assert script.read_documents(tmp_path / name) == [text]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "either --minutes or --steps"),
        (["--steps", "1", "--minutes", "1"], "either --minutes or --steps"),
        (["--steps", "1", "--resume"], "nothing to resume"),
        (["--steps", "1", "--window", "100000"], "too few"),
    ],
)
def test_a_wrong_command_is_told_what_is_allowed(script, text_file, tmp_path, options, words):
    result = train(script, text_file, tmp_path / "model", *options)
    assert result.exit_code == 2 and words in result.output
