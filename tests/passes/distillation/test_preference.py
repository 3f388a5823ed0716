"""Preferences by TRL: margins grow, zeros stay, and nothing of the trainer is left behind."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import llmcompress
from llmcompress.errors import CompressError
from llmcompress.passes.distillation.preference import as_it_was
from llmcompress.progress import Silent
from tests.tiny_folder import write_tiny_llama

ROWS = "\n".join(
    f'{{"prompt": "the {word}", "chosen": " jumps over", "rejected": " lazy dog"}}' for word in ("fox", "dog", "cat")
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    return write_tiny_llama(tmp_path / "m", dtype=torch.float32)


def recipe(folder: Path, **options: Any) -> dict[str, Any]:
    how = {"steps": 12, "batch": 3, "learning_rate": 1e-3, **options}
    return {
        "calibration": {"samples": 2, "tokens": 32},
        "data": [{"read": {"source": str(folder.parent / "rows.jsonl")}}],
        "passes": [{"random": {"sparsity": 0.3}}, {"preference": how}],
        "evaluate": {}, "guard": {"windows": 0},
    }  # fmt: skip


@torch.no_grad()
def margin(model: PreTrainedModel, tokenizer: Any) -> float:
    """log p(chosen) - log p(rejected), mean over prompts."""
    total = 0.0
    for word in ("fox", "dog", "cat"):
        for sign, answer in ((1, " jumps over"), (-1, " lazy dog")):
            before = tokenizer(f"the {word}")["input_ids"]
            ids = torch.tensor([*before, *tokenizer(answer)["input_ids"]])
            found = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[len(before) - 1 :]
            total += sign * float(found.sum()) / 3
    return total


def test_the_chosen_answer_becomes_likelier_and_zeros_stay(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = recipe(folder)
    before = llmcompress.compress(str(folder), {**asked, "data": [], "passes": asked["passes"][:1]})
    state, numpy_state = random.getstate(), np.random.get_state()[1]
    after = llmcompress.compress(str(folder), asked)
    assert random.getstate() == state and np.array_equal(np.random.get_state()[1], numpy_state)
    assert margin(after.model, after.tokenizer) > margin(before.model, before.tokenizer) + 0.5
    for name, weight in after.model.named_parameters():
        if "proj" in name:
            assert torch.equal(weight == 0, before.model.get_parameter(name) == 0)
    assert "forward" not in vars(after.model) and after.model.config.to_dict() == before.model.config.to_dict()
    assert capfd.readouterr().out == ""
    again = llmcompress.compress(str(folder), asked)
    assert all(torch.equal(a, b) for a, b in zip(after.model.parameters(), again.model.parameters(), strict=True))


class Dies(Silent):
    """In a step, or never; remembers all."""

    def __init__(self, at: str = "") -> None:
        self._at, self.steps, self.notes = at, list[str](), list[str]()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        if text.startswith("preference: step"):
            self.steps.append(text)
            if text == self._at:
                raise KeyboardInterrupt


def test_killed_and_resumed_equals_uninterrupted(folder: Path, tmp_path: Path) -> None:
    asked = recipe(folder, save_every=5)
    through = llmcompress.compress(str(folder), asked)
    with pytest.raises(KeyboardInterrupt):
        llmcompress.compress(str(folder), asked, tmp_path / "out", progress=Dies("preference: step 9/12"))
    kept = tmp_path / "out.run" / "work" / "01-training-preference"
    assert [path.name for path in kept.iterdir() if path.is_dir()] == ["step-000000005"]
    (kept / "checkpoint-10").mkdir()  # what a kill in the middle of a save leaves behind
    steps = Dies()
    resumed = llmcompress.compress(str(folder), asked, tmp_path / "out", progress=steps)
    assert steps.steps[0] == "preference: step 6/12" and len(steps.steps) == 7
    assert all(torch.equal(a, b) for a, b in zip(through.model.parameters(), resumed.model.parameters(), strict=True))
    assert not (tmp_path / "out.run").exists()


def test_a_damaged_state_is_not_resumed_from(folder: Path, tmp_path: Path) -> None:
    asked = recipe(folder, save_every=5)
    with pytest.raises(KeyboardInterrupt):
        llmcompress.compress(str(folder), asked, tmp_path / "out", progress=Dies("preference: step 9/12"))
    optimizer = tmp_path / "out.run" / "work" / "01-training-preference" / "step-000000005" / "optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    steps = Dies()
    llmcompress.compress(str(folder), asked, tmp_path / "out", progress=steps)
    assert steps.steps[0] == "preference: step 1/12"
    assert any("step-000000005 is damaged and removed" in note for note in steps.notes)


def test_a_model_is_afterwards_what_it_was(folder: Path) -> None:
    model = llmcompress.load(folder).model
    before = copy.deepcopy(model.config.to_dict())
    with as_it_was(model):
        model.forward = lambda: None
        model.config.pad_token_id = 7
        model.train()
    assert "forward" not in vars(model) and model.config.to_dict() == before and not model.training


def test_rows_without_two_answers_and_a_recipe_without_rows_are_refused(folder: Path) -> None:
    asked = recipe(folder)
    with pytest.raises(CompressError) as caught:
        llmcompress.compress(str(folder), {**asked, "data": [{"prompts": {"texts": ["a"]}}]})
    assert caught.value.code == "data.columns" and "'chosen'" in caught.value.what
    with pytest.raises(CompressError) as caught:
        llmcompress.compress(str(folder), {**asked, "data": []})
    assert caught.value.code == "data.none"


def test_without_trl_the_command_that_installs_it_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(CompressError) as caught:
        llmcompress.compress(str(folder), recipe(folder))
    assert caught.value.code == "preference.not-installed" and "llmcompress[preference]" in caught.value.fix
