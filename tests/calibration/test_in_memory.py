"""Calibration data in memory: one text gives the same windows however it is handed over; padding is never measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from llmcompress import Calibration, CompressError, compress
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.in_memory import as_calibration
from llmcompress.calibration.token_windows import CalibrationData
from llmcompress.presets import as_recipe
from tests.tiny_folder import SENTENCE, write_tiny_llama

TEXTS = [f"{number}: {SENTENCE} " * (3 + number % 4) for number in range(40)]
CHATS = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in TEXTS]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SETTINGS = Calibration(samples=6, tokens=32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")
    )
    found.chat_template = TEMPLATE
    return found


def windows(given: Any, tokenizer: PreTrainedTokenizerBase, settings: Calibration = SETTINGS) -> CalibrationData:
    chosen, data = as_calibration(given, settings)
    return calibration_windows(chosen, tokenizer, max_positions=64, seed=3, given=data)


def refused(given: Any, tokenizer: PreTrainedTokenizerBase, settings: Calibration = SETTINGS) -> CompressError:
    with pytest.raises(CompressError) as error:
        windows(given, tokenizer, settings)
    return error.value


@pytest.fixture
def from_file(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> CalibrationData:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return windows(str(path), tokenizer)


FORMS = {
    "list": lambda: TEXTS,
    "tuple": lambda: tuple(TEXTS),
    "generator": lambda: (text for text in TEXTS),
    "records": lambda: [{"text": text, "id": 1} for text in TEXTS],
    "Dataset": lambda: datasets.Dataset.from_dict({"id": range(40), "text": TEXTS}),
    "IterableDataset": lambda: datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
}


@pytest.mark.parametrize("form", FORMS)
def test_texts_give_the_windows_of_the_file_that_holds_them(
    form: str, from_file: CalibrationData, tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = Calibration(samples=6, tokens=32) if form in ("list", "tuple", "records") else WIDE
    found = windows(FORMS[form](), tokenizer, settings)
    if settings is WIDE:  # streams are read as far as needed: with more asked for than there is, all of it
        expected = windows(TEXTS, tokenizer, settings)
        assert torch.equal(found.windows_NT, expected.windows_NT) and found.fingerprint == expected.fingerprint
        return
    assert torch.equal(found.windows_NT, from_file.windows_NT)
    assert found.fingerprint == from_file.fingerprint and found.paragraphs == from_file.paragraphs


WIDE = Calibration(samples=400, tokens=32)


def test_a_stream_is_read_only_as_far_as_needed(tokenizer: PreTrainedTokenizerBase) -> None:
    taken = []

    def endless() -> Any:
        number = 0
        while True:
            taken.append(number)
            yield TEXTS[number % 40]
            number += 1

    assert len(windows(endless(), tokenizer).windows_NT) == 6 and len(taken) < 40


def test_conversations_go_through_the_chat_template(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    expected = windows(str(path), tokenizer).windows_NT
    for given in (CHATS, [{"messages": chat} for chat in CHATS], datasets.Dataset.from_dict({"messages": CHATS})):
        assert torch.equal(windows(given, tokenizer, SETTINGS if isinstance(given, list) else WIDE).windows_NT[:2], (
            windows(CHATS, tokenizer, SETTINGS if isinstance(given, list) else WIDE).windows_NT[:2]
        ))  # fmt: skip
    assert torch.equal(windows(CHATS, tokenizer).windows_NT, expected)
    single = [part for chat in CHATS for part in chat]  # one long conversation
    assert "assistant" in tokenizer.decode(windows(single, tokenizer).windows_NT[0])


def ready_made(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    return windows(TEXTS, tokenizer).windows_NT


BATCHES = {
    "tensor": lambda ids: [ids],
    "two tensors": lambda ids: [ids[:4], ids[4:]],
    "rows": lambda ids: list(ids),
    "lists": lambda ids: ids.tolist(),
    "arrays": lambda ids: list(ids.numpy()),
    "dictionaries": lambda ids: [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}],
    "one dictionary": lambda ids: {"input_ids": ids},
    "a BatchEncoding": lambda ids: BatchEncoding({"input_ids": ids}),
    "DataLoader": lambda ids: DataLoader(TensorDataset(ids), batch_size=4),
    "tokenized Dataset": lambda ids: datasets.Dataset.from_dict({"input_ids": ids.tolist()}),
}


@pytest.mark.parametrize("form", BATCHES)
def test_rows_of_one_length_are_windows_as_they_are(form: str, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = ready_made(tokenizer)
    found = windows(BATCHES[form](ids), tokenizer)
    assert torch.equal(found.windows_NT, ids) and not found.warnings
    assert found.source == windows([ids], tokenizer).source


def test_windows_behind_those_that_are_measured_are_held_out(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = ready_made(tokenizer)
    settings = SETTINGS.model_copy(update={"samples": 4})
    joined = [ids[:5].flatten().tolist(), [7]]
    for given, left in ([ids], 2), ([ids[:5]], 1), (list(ids[:4]), 0), (joined, 1):
        chosen, data = as_calibration(given, settings, held_out=2)
        found = calibration_windows(chosen, tokenizer, max_positions=64, seed=3, given=data, held_out=2)
        assert torch.equal(found.windows_NT, ids[:4])
        assert (0 if found.held_out_NT is None else len(found.held_out_NT)) == left
        assert any("nothing is held out" in each for each in found.warnings) == (left == 0)
        if found.held_out_NT is not None:
            assert torch.equal(found.held_out_NT, ids[4 : 4 + left])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side: str, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = ready_made(tokenizer)
    padding = torch.full((6, 5), 7)
    parts, masks = [ids, padding], [torch.ones_like(ids), torch.zeros_like(padding)]
    padded, mask = (torch.cat(each if side == "right" else each[::-1], dim=1) for each in (parts, masks))
    assert torch.equal(windows([{"input_ids": padded, "attention_mask": mask}], tokenizer).windows_NT, ids)


def test_rows_of_different_lengths_are_joined_and_cut_without_a_padding_token(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    lists = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    longest = max(map(len, lists))
    padded = torch.tensor([row + [7] * (longest - len(row)) for row in lists])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in lists])
    found = windows([{"input_ids": padded, "attention_mask": mask}], tokenizer)
    assert found.windows_NT.shape == (6, 32) and "joined and cut" in found.warnings[0]
    separator = tokenizer.eos_token_id
    joined = [token for row in lists for token in (*row, separator)]
    assert found.windows_NT.flatten().tolist() == joined[: 6 * 32]


def test_rows_longer_than_the_model_are_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    found = windows([torch.arange(200).view(1, 200) % 250 + 2], tokenizer, Calibration(samples=2, tokens=100))
    assert found.windows_NT.shape == (2, 64)


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ([], "data.empty"),
        ([[]], "data.empty"),
        ([3.5], "data.kind"),
        (7, "data.kind"),
        ([torch.randn(2, 8)], "data.tokens"),
        ([torch.full((2, 8), -1)], "data.tokens"),
        ([torch.zeros(2, 8, 3, dtype=torch.long)], "data.tokens"),
        ([{"input_ids": torch.ones(2, 8, dtype=torch.long), "attention_mask": torch.ones(2, 7)}], "data.mask"),
        ([{"input_ids": [[5, 6, 7, 8]], "attention_mask": [[1, 0, 1, 1]]}], "data.mask"),
        ([{"other": "text"}], "data.columns"),
        ({"sample": 3}, "recipe.value"),
        ({"samples": "many"}, "recipe.value"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})), "data.split"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(given: Any, code: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert refused(given, tokenizer).code == code


def test_padding_without_a_mask_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.pad_token = "</s>"
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, tokenizer.pad_token_id, tokenizer.pad_token_id]])
    assert refused([ids], tokenizer).code == "data.padding"
    assert windows([{"input_ids": ids, "attention_mask": ids != tokenizer.pad_token_id}], tokenizer, SHORT).tokens
    tokenizer.pad_token = None


SHORT = Calibration(samples=1, tokens=3, min_tokens=1)


def test_settings_change_the_recipe_and_data_are_named_by_their_hash() -> None:
    assert as_calibration(None, SETTINGS) == (SETTINGS, None)
    assert as_calibration({"samples": 9}, SETTINGS)[0] == Calibration(samples=9, tokens=32)
    assert as_calibration("my.txt", SETTINGS)[0].source == "my.txt"
    assert as_calibration(Calibration(samples=2), SETTINGS)[0].tokens == 512
    sources = [as_calibration(given, SETTINGS)[0].source for given in (TEXTS, list(TEXTS), TEXTS[:-1])]
    assert sources[0] == sources[1] != sources[2] and sources[0].startswith("memory:texts:")


def test_a_recipe_with_data_from_memory_is_refused_without_them(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    recipe = "calibration: {samples: 4, tokens: 32}\npasses: [{gptq: {scheme: int4_g16}}]\nevaluate: {perplexity: []}"
    made = compress(str(folder), recipe, tmp_path / "out", calibration=TEXTS)
    saved = as_recipe(tmp_path / "out" / "llmcompress_recipe.yaml")
    assert saved.calibration.source == made.recipe.calibration.source
    with pytest.raises(CompressError) as error:
        compress(None, saved, tmp_path / "again")
    assert error.value.code == "data.in-memory" and not list(tmp_path.glob("again*"))
    again = compress(None, saved, calibration=TEXTS)
    assert again.report.recipe_hash == made.report.recipe_hash
    a, b = made.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
