"""A runner gives what the model gives, leaves it as it was, and names what overflows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from llmcompress.calibration.offloading import OnDisk
from llmcompress.errors import CompressError
from llmcompress.evaluation.scores import score
from llmcompress.loading.load import load, load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.runners.base import RUNNERS
from llmcompress.runners.torch_runner import TorchRunner
from tests.families import FAMILIES, tiny_model, tiny_tokens
from tests.tiny_folder import write_tiny_llama
from tests.tiny_text import tiny_llama

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 4, 7, 11, 3], [8], [6, 5, 4]]


@torch.no_grad()
def greedy(model, prompt: list[int], count: int) -> list[int]:
    """Without a cache, one whole forward per token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_every_runtime_opens_by_its_name_and_says_what_it_is(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    ids_BT = torch.arange(12).reshape(2, 6)
    with RUNNERS["torch"].open(str(folder), device=CPU, dtype=torch.float32) as runner:
        assert (runner.name, runner.vocabulary, runner.max_positions, runner.device) == ("torch", 288, 64, CPU)
        model, _ = load(folder, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(runner.logits(ids_BT), model(ids_BT).logits)
    with pytest.raises(CompressError, match="unknown runner 'torhc'") as unknown:
        RUNNERS["torhc"]
    assert "torch" in unknown.value.fix


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_unequal_length_get_together_what_each_gets_from_whole_forwards(family: str) -> None:
    model = tiny_model(family)
    with TorchRunner(model) as runner:
        found = runner.generate(PROMPTS, max_new_tokens=4)
    assert found == [greedy(model, prompt, 4) for prompt in PROMPTS]


def test_a_text_ends_before_the_first_stop_token() -> None:
    model = tiny_model("llama")
    whole = [greedy(model, prompt, 8) for prompt in PROMPTS]
    stop = {whole[0][2], whole[2][4]}
    with TorchRunner(model) as runner:
        found = runner.generate(PROMPTS, max_new_tokens=8, stop=stop)
    for tokens, before in zip(found, whole, strict=True):
        end = next((place for place, token in enumerate(before) if token in stop), len(before))
        assert tokens == before[:end]


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_steps_are_the_greedy_tokens_of_whole_forwards(family: str) -> None:
    model = tiny_model(family)
    ids_BT = tiny_tokens(family, batch=2, length=5)
    with TorchRunner(model) as runner:
        steps = list(runner.stream(ids_BT, max_new_tokens=4))
    assert [step.shape for step in steps] == [(2,)] * 4
    assert torch.stack(steps, dim=1).tolist() == [greedy(model, prompt, 4) for prompt in ids_BT.tolist()]


def test_a_streamed_model_reads_its_prompt_once_and_then_one_token_a_step() -> None:
    model = tiny_llama()
    read: list[int] = []
    note = model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    with TorchRunner(model) as runner:
        steps = runner.stream(torch.tensor([PROMPTS[0]]), max_new_tokens=3)
        assert read == [], "nothing is computed ahead"
        for count, _ in enumerate(steps, start=1):
            assert len(read) == count
    note.remove()
    assert read == [6, 1, 1]


def test_settings_that_come_with_the_model_are_not_used_and_come_back() -> None:
    model = tiny_model("llama")
    own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, max_length=3, eos_token_id=[2])
    model.generation_config = own
    with TorchRunner(model) as runner:
        assert runner.generate([PROMPTS[0]], max_new_tokens=6) == [greedy(model, PROMPTS[0], 6)]
    assert model.generation_config is own


def test_the_model_is_in_eval_mode_while_the_runner_is_open_and_then_as_it_was() -> None:
    model = tiny_llama().train()
    with TorchRunner(model):
        assert not model.training
    assert model.training


def test_weights_on_disk_give_the_logits_of_weights_in_memory(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    source = find_source(str(folder))
    ids_BT = torch.arange(10).reshape(1, 10)
    mapped = load_for_compression(source, scratch=tmp_path / "scratch")
    assert mapped.weights is not None
    with (
        TorchRunner(load_for_compression(source).model) as here,
        TorchRunner(mapped.model, weights_at=OnDisk(mapped.weights), device=CPU) as there,
    ):
        assert torch.equal(here.logits(ids_BT), there.logits(ids_BT))


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "mistral", "opt"])
def test_both_kinds_of_attention_give_the_same_scores(family: str) -> None:
    model = tiny_model(family)
    windows = [*tiny_tokens(family, batch=3, length=20), tiny_tokens(family, batch=1, length=9, seed=1)[0]]
    found = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        with TorchRunner(model) as runner:
            found[attention] = list(score(runner, windows, top=5))
    for eager, sdpa in zip(found["eager"], found["sdpa"], strict=True):
        torch.testing.assert_close(sdpa.logprob_P, eager.logprob_P, rtol=0, atol=2e-5)
        assert torch.equal(sdpa.best_P, eager.best_P) and torch.equal(sdpa.ids_PK, eager.ids_PK)


def test_activations_beyond_float16_are_told_with_window_token_and_place() -> None:
    model = tiny_llama().half()
    windows = [torch.arange(3, 15), torch.arange(20, 32)]
    with TorchRunner(model) as runner:
        assert runner.logits(windows[0][None]).dtype == torch.float16
        assert len(list(score(runner, windows))) == 2
    model.model.layers[1].mlp.down_proj.weight.data *= 6e4 / model.model.layers[1].mlp.down_proj.weight.abs().max()
    model.model.layers[1].mlp.up_proj.weight.data *= 50
    with TorchRunner(model) as runner, pytest.raises(CompressError) as told:
        list(score(runner, windows, name="a text"))
    assert told.value.code == "numerics.not-finite"
    assert "window 1 of a text, token" in told.value.where
    assert "model.layers.1.mlp.down_proj" in told.value.what and "bfloat16" in told.value.fix
