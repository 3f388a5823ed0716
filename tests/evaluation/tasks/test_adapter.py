"""The adapter from a runner to lm-eval against lm-eval's own class for transformers models, on the same requests."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, DatasetDict
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from llmcompress.errors import CompressError
from llmcompress.evaluation.settings.tasks import TaskSettings
from llmcompress.evaluation.tasks.adapter import RunnerLM
from llmcompress.evaluation.tasks.answering import answer
from llmcompress.evaluation.tasks.definitions import TaskLoader
from llmcompress.loading.load import load
from llmcompress.progress import Silent
from llmcompress.records.tasks import TaskDataset
from llmcompress.runners.torch_runner import TorchRunner
from tests.tiny_text import byte_tokenizer, tiny_llama

STORY = "The quick brown fox, naïve as ever, jumps over the lazy dog. "


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


@pytest.fixture(scope="module", params=["with BOS", "without BOS"])
def both(request):
    """lm-eval's own and ours, on one model of 64 positions."""
    model = tiny_llama()
    # generation of a random model is a lottery between almost equal logits: these are far apart
    model.lm_head.weight.data *= 8
    model.lm_head.weight.data[:3] = 0  # no text ends early
    tokenizer = byte_tokenizer(bos_habit=request.param == "with BOS")
    tokenizer.pad_token = "</s>"
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    with TorchRunner(model) as runner:
        yield (
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
            RunnerLM(runner, tokenizer, progress=Silent()),
        )


def test_likelihoods_are_the_same(both):
    asked = requests(
        "loglikelihood",
        ("The quick", " brown"),
        ("The quick", " b"),
        ("The quick", " c"),
        ("The quick ", "fox"),  # a space at the end of the context belongs to the answer
        ("", "Once"),
        ("<s>The", " quick"),
        (STORY * 3, "The end"),  # longer than the model: cut off on the left
    )
    theirs, ours = (lm.loglikelihood(asked, disable_tqdm=True) for lm in both)
    for (one, greedy), (other, also) in zip(theirs, ours, strict=True):
        assert one == pytest.approx(other, abs=1e-4) and greedy == also


def test_rolling_likelihoods_of_documents_longer_than_the_model_are_the_same(both):
    asked = requests("loglikelihood_rolling", (STORY,), (STORY * 4,), ("A",))
    theirs, ours = (lm.loglikelihood_rolling(asked, disable_tqdm=True) for lm in both)
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_generated_answers_are_the_same_whatever_their_length_and_end(both):
    theirs, ours = both
    free = ours.generate_until(requests("generate_until", ("The quick", {"until": [], "max_gen_toks": 40})))[0]
    asked = requests(
        "generate_until",
        ("The quick", {"until": [], "max_gen_toks": 40}),
        ("The quick", {"until": [free[8:10]], "max_gen_toks": 40}),
        (STORY * 2, {"until": [free[3:4]], "max_gen_toks": 12}),
        ("fox", {"until": "\n\n", "max_gen_toks": 33, "do_sample": False, "temperature": 0.0}),
    )
    wanted, found = theirs.generate_until(asked, disable_tqdm=True), ours.generate_until(asked)
    assert found == wanted
    assert len(found[0]) > 10 and len(found[1]) <= 8 and free[8:10] not in found[1]


def test_chat_prompts_are_the_same_with_and_without_a_system_message(both, monkeypatch):
    theirs, ours = both
    refuses = "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    turns = f"{{% for m in messages %}}{refuses}[{{{{ m.role }}}}]{{{{ m.content }}}}{{% endfor %}}"
    monkeypatch.setattr(ours.tokenizer, "chat_template", turns + "{% if add_generation_prompt %}[assistant]{% endif %}")
    user, start = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am"}
    for chat, prompted in (
        ([user], True),
        ([{"role": "system", "content": "Be kind."}, user], True),
        ([user, start], False),
    ):
        wanted = theirs.apply_chat_template(chat, add_generation_prompt=prompted)
        assert ours.apply_chat_template(chat, add_generation_prompt=prompted) == wanted
    assert wanted == "[user]Hi[assistant]I am"


def test_a_task_that_samples_or_writes_more_than_fits_is_refused(both):
    _, ours = both
    for settings, code in (({"do_sample": True}, "tasks.sampling"), ({"max_gen_toks": 64}, "tasks.too-long")):
        with pytest.raises(CompressError) as caught:
            ours.generate_until(requests("generate_until", ("A", {"until": ["."], **settings})))
        assert caught.value.code == code


def test_scores_of_a_task_on_the_bundled_model_equal_those_of_lm_eval():
    bundled = load("builtin:books-llama", dtype=torch.float32, device=torch.device("cpu"))
    settings = TaskSettings(task="builtin_word_order", limit=24)
    loaded = TaskLoader().load(settings.task, data=None)
    with TorchRunner(bundled.model) as runner:
        (ours,) = answer(runner, bundled.tokenizer, loaded, settings, progress=Silent()).tasks
    theirs = evaluate(
        HFLM(pretrained=bundled.model, tokenizer=bundled.tokenizer, batch_size=1),
        {"tasks": dict(TaskLoader().load(settings.task, data=None).tasks)},
        limit=24,
        bootstrap_iters=1,
    )
    result, samples = theirs["results"][settings.task], theirs["samples"][settings.task]
    assert ours.main == "acc" and ours.scores[0].value == result["acc,none"] > 0.5
    assert ours.scores[0].standard_error == pytest.approx(result["acc_stderr,none"])
    assert ours.dataset is None, "its documents are a file"
    assert ours.values("acc") == [sample["acc"] for sample in samples]
    for own, sample in zip(ours.answers, samples, strict=True):
        likelihoods = [each[0] for each in sample["filtered_resps"]]
        right = likelihoods.pop(sample["target"])
        assert own.margin == pytest.approx(right - max(likelihoods), abs=1e-3)


def test_a_task_on_a_dataset_of_the_hub_tells_which_and_how_many_rows_its_split_has(monkeypatch, tmp_path):
    rows = [{"text": "The quick", "choices": [" fox", " dog"], "gold": number % 2} for number in range(6)]
    held = DatasetDict(test=Dataset.from_list(rows), train=Dataset.from_list(rows[:1]))
    asked = []

    def read(path, name=None, **_):
        asked.append((path, name))
        return held

    monkeypatch.setattr("datasets.load_dataset", read)
    file = tmp_path / "task.yaml"
    file.write_text(
        "task: of_the_hub\ndataset_path: lab/questions\ndataset_name: hard\noutput_type: multiple_choice\n"
        "test_split: test\ndoc_to_text: text\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    loaded = TaskLoader().load(str(file), data=None)
    settings = TaskSettings(task=str(file), limit=2)
    with TorchRunner(tiny_llama()) as runner:
        (found,) = answer(runner, byte_tokenizer(), loaded, settings, progress=Silent()).tasks
    assert asked == [("lab/questions", "hard")] and len(found.answers) == 2
    assert found.dataset == TaskDataset(path="lab/questions", config="hard", split="test", rows=6)
