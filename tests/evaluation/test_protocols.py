"""Published protocols against their own loops, written out plainly, and against the installed lm-eval."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from llmcompress.errors import CompressError
from llmcompress.evaluation.perplexity import perplexity
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.evaluation.settings.protocol import protocol_names, protocol_summary
from llmcompress.evaluation.texts import evaluation_text
from llmcompress.evaluation.windows import spans
from llmcompress.loading.load import load
from tests.tiny_text import byte_tokenizer, tiny_llama

TEXT = "The quick brown fox, naïve as ever, jumps over the lazy dog. " * 4
DOCUMENTS = [TEXT, "Short.", "A second document of middling length, with a number 7 in it."]


def local(tmp_path, name: str, **options: Any) -> PerplexityTask:
    """The protocol on a local table of documents."""
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    return PerplexityTask(protocol=name, source=str(file), **options)


@torch.no_grad()
def gptq_loop(model, tokenizer, documents: list[str], window: int) -> float:
    """The loop of `llama.py` in the GPTQ and SparseGPT repositories."""
    tokens = torch.tensor([tokenizer("\n\n".join(documents))["input_ids"]])
    losses = []
    count = tokens.numel() // window
    for number in range(count):
        batch = tokens[:, number * window : (number + 1) * window]
        logits = model(batch).logits
        mean = functional.cross_entropy(logits[0, :-1].double(), batch[0, 1:])
        losses.append(mean * window)
    return float(torch.exp(torch.stack(losses).sum() / (count * window)))


@torch.no_grad()
def llama_perplexity_loop(model, tokenizer, documents: list[str], window: int, bos: int | None) -> float:
    """`perplexity` of llama.cpp's tools/perplexity/perplexity.cpp."""
    tokens = tokenizer("\n\n".join(documents), add_special_tokens=False)["input_ids"]
    tokens = tokens if bos is None else [bos, *tokens]
    loss, count, first = 0.0, 0, window // 2
    for number in range(len(tokens) // window):
        chunk = tokens[number * window : (number + 1) * window]
        run = chunk if bos is None else [bos, *chunk[1:]]
        logits = model(torch.tensor([run])).logits[0].double()
        for place in range(first, window - 1):
            loss -= float(torch.log_softmax(logits[place], -1)[chunk[place + 1]])
            count += 1
    return math.exp(loss / count)


@pytest.mark.parametrize("habit", [True, False])
@pytest.mark.parametrize(("name", "window"), [("gptq", 32), ("gptq", 31), ("llm-pruner", 16), ("wanda", None)])
def test_windows_of_the_gptq_repository_give_its_perplexity(tmp_path, name, window, habit):
    model, tokenizer = tiny_llama(), byte_tokenizer(bos_habit=habit)
    changed = {} if window is None else {"window": window}
    found = perplexity(model, tokenizer, local(tmp_path, name, **changed))
    # wanda's windows are 4096 tokens or the model's limit
    assert found.window == (window or 64)
    assert found.perplexity == pytest.approx(gptq_loop(model, tokenizer, DOCUMENTS, found.window), rel=1e-5)
    assert found.protocol == (name if window is None else f"{name} with window {window}")


@pytest.mark.parametrize("habit", [True, False])
@pytest.mark.parametrize("window", [16, 33])
def test_chunks_of_llama_cpp_give_what_llama_perplexity_prints(tmp_path, window, habit):
    model, tokenizer = tiny_llama(), byte_tokenizer(bos_habit=habit)
    found = perplexity(model, tokenizer, local(tmp_path, "llama-cpp", window=window))
    wanted = llama_perplexity_loop(model, tokenizer, DOCUMENTS, window, 0 if habit else None)
    assert found.perplexity == pytest.approx(wanted, rel=1e-5)
    assert (found.bos, found.tokens % (window - 1 - window // 2)) == (habit, 0)


def test_overlapping_windows_count_every_token_once_from_the_longest_context(tmp_path):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    task = PerplexityTask(source=str(tmp_path / "text.txt"), window=32, stride=8, scored="new", max_windows="all")
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    loss, covered = 0.0, 1
    for start in range(0, len(tokens), 8):
        end = min(start + 32, len(tokens))
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:end]])).logits[0].double()
        for place in range(covered, end):
            loss -= float(torch.log_softmax(logits[place - 1 - start], -1)[tokens[place]])
        covered = end
        if end == len(tokens):
            break
    found = perplexity(model, tokenizer, task)
    assert found.tokens == len(tokens) - 1
    assert found.perplexity == pytest.approx(math.exp(loss / found.tokens), rel=1e-5)
    assert found.protocol == 'default with stride 8, scored "new"'


@pytest.mark.parametrize("last", ["kept", "dropped", "whole"])
@pytest.mark.parametrize("next_token", [True, False])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 16, 17, 23])
def test_new_predictions_are_each_counted_once(count, next_token, last):
    task = PerplexityTask(source="x", scored="new", bos="never", next_token=next_token, last=last)
    found = spans(count, task, 8, own_bos=False)
    counted = [token for span in found for token in range(span.scored_from, span.end)]
    assert len(set(counted)) == len(counted) and 0 not in counted
    assert all(span.end - span.start <= 8 + next_token and span.scored_from > span.start for span in found)
    if next_token and last != "dropped":
        assert counted == list(range(1, count))


def lm_eval_figures(model, tokenizer, file: str) -> dict[str, float]:
    """Of a local `loglikelihood_rolling` task."""
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    task = ConfigurableTask(
        config={
            "task": "local",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": file}},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": f"{unit}_perplexity"} for unit in ("word", "byte")],
        }
    )
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    found = simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0)["results"]["local"]
    return {unit: found[f"{unit}_perplexity,none"] for unit in ("word", "byte")}


def test_lm_evals_rolling_figures_are_reproduced_on_the_bundled_model(tmp_path):
    loaded = load("builtin:books-llama", dtype=torch.float32)
    task = local(tmp_path, "lm-eval-rolling")
    # longer than the model's 512 positions, so that windows roll and the last one is made whole
    long = "\n".join(f"It was evening when traveller {number} came to the inn." for number in range(90))
    with open(task.source, "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": long}) + "\n")
    found = perplexity(loaded.model, loaded.tokenizer, task)
    assert found.window == 512 and found.tokens > 2 * 512
    wanted = lm_eval_figures(loaded.model, loaded.tokenizer, task.source)
    assert found.word_perplexity == pytest.approx(wanted["word"], rel=1e-4)
    assert found.byte_perplexity == pytest.approx(wanted["byte"], rel=1e-4)


@pytest.mark.parametrize("habit", [True, False])
def test_with_a_prefix_every_byte_is_predicted_and_words_are_lm_evals(tmp_path, habit):
    prepared = evaluation_text(local(tmp_path, "lm-eval-rolling"), byte_tokenizer(bos_habit=habit), 16)
    assert prepared.predicted_bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert prepared.words == sum(len(text.strip().split()) for text in DOCUMENTS) + 1  # an end of white space counts
    assert prepared.tokens == sum(len(text.encode()) + habit for text in DOCUMENTS)
    assert max(len(window) for window in prepared.windows) == 17
    bounded = evaluation_text(local(tmp_path, "lm-eval-rolling", max_windows=2), byte_tokenizer(), 16)
    assert bounded.words is None and len(bounded.windows) == 2


@pytest.mark.parametrize("name", protocol_names())
def test_every_protocol_is_a_task_that_reads_back_from_its_own_options(name):
    task = PerplexityTask(protocol=name)
    assert task.protocol_name == name and protocol_summary(name)
    assert task.source in ("wikitext2", "c4", "ptb")
    again = PerplexityTask.model_validate_json(task.model_dump_json(), strict=True)
    assert again == task and again.protocol_name == name


def test_what_is_written_beside_a_protocol_counts_more():
    task = PerplexityTask(protocol="gptq", window=1024, source="my.txt")
    assert (task.window, task.source, task.last) == (1024, "my.txt", "dropped")
    assert task.protocol_name == "gptq with window 1024"
    assert PerplexityTask(source="x", window=512, bos="always").protocol_name == "default"


def test_options_that_contradict_each_other_are_refused():
    for wrong in (
        {"stride": 4},
        {"stride": 40, "window": 32, "scored": "new"},
        {"next_token": True},
        {"protocol": "gptk"},
        {"source": "x", "split": ""},
    ):
        with pytest.raises(ValueError):
            PerplexityTask(**{"source": "x", **wrong})
    with pytest.raises(CompressError, match="neither a BOS nor an EOS"):
        evaluation_text(
            PerplexityTask(source="builtin:evaluation", bos="prefix"), byte_tokenizer(bos=False, eos=False), 64
        )
