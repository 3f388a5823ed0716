"""Training data: what is learned of a row, the order of samples, streams that go on where they were."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from llmcompress.errors import CompressError
from llmcompress.training.data import encoders
from llmcompress.training.data.base import BatchRange, TrainingData
from llmcompress.training.data.batch import IGNORED, Batch, Sample, padded
from llmcompress.training.data.examples import Examples, samples, training_data
from tests.tiny_text import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PAIRS = [{"prompt": f"question {n}: ", "response": "yes" * (n % 5)} for n in range(11)]
DOCUMENTS = [{"text": f"document {n} " * (1 + n % 4)} for n in range(40)]
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]


def tokenizer(**options: Any) -> Any:
    made = byte_tokenizer(**options)
    made.chat_template = TEMPLATE
    return made


def examples(**options: Any) -> Examples:
    return Examples(**{"source": "rows", "tokens": 32, **options})


def learned(batch: Batch) -> list[str]:
    """The text that each sample of a batch has to predict."""
    return [
        tokenizer().decode([token for token in row.tolist() if token != IGNORED], skip_special_tokens=False)
        for row in batch.targets_BT
    ]


def batches(data: TrainingData, first: int, end: int, seed: int = 0, size: int = 3) -> list[Batch]:
    return list(data.loader(BatchRange(first, end, size, seed)))


def same(a: list[Batch], b: list[Batch]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x.ids_BT, y.ids_BT) and torch.equal(x.targets_BT, y.targets_BT) for x, y in pairs)


def test_padding_is_neither_attended_nor_predicted() -> None:
    batch = padded([Sample(torch.tensor([5, 6, 7])), Sample(torch.tensor([8, 9]), torch.tensor([False, True]))])
    assert batch.targets_BT.tolist() == [[6, 7, IGNORED], [9, IGNORED, IGNORED]]
    assert batch.attention_BT is not None and batch.attention_BT.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.predicted == 3
    assert padded([Sample(torch.tensor([5, 6]))]).attention_BT is None


def test_of_prompt_and_response_only_the_response_is_learned() -> None:
    data = samples(Dataset.from_list(PAIRS[3:4]), examples(kind="prompt"), tokenizer(bos_habit=True))
    (batch,) = batches(data, 0, 1, size=1)
    assert learned(batch) == ["yesyesyes</s>"]
    assert tokenizer().decode(batch.ids_BT[0]) == "<s>question 3: yesyesyes</s>"


@pytest.mark.parametrize("marked", [False, True])
def test_of_a_conversation_only_the_assistants_turns_are_learned(marked: bool) -> None:
    made = tokenizer()
    if marked:
        made.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
            "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
        )
    data = samples(Dataset.from_list([{"messages": TURNS}]), examples(kind="chat", tokens=200), made)
    (batch,) = batches(data, 0, 1, size=1)
    assert learned(batch) == ["hello</s>ciao</s>"]
    whole = "<user>hi</s><assistant>hello</s><user>bye</s><assistant>ciao</s>"
    assert made.decode(batch.ids_BT[0]) == whole


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    made = tokenizer()
    made.chat_template = "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m.content }}{% endfor %}"
    data = samples(Dataset.from_list([{"messages": TURNS}]), examples(kind="chat"), made)
    with pytest.raises(CompressError) as caught:
        batches(data, 0, 1, size=1)
    assert caught.value.code == "data.bad-row" and "generation" in caught.value.what


@pytest.mark.parametrize("marked", [False, True])
def test_a_template_that_runs_on_is_a_bad_row_and_a_text_that_ended_is_not_looked_at_again(
    marked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tokenizer()
    body = "{% generation %}{{ m.content }}{% endgeneration %}" if marked else "{{ m.content }}"
    made.chat_template = (
        "{% for m in messages %}" + body + "{% if m.content == 'on' %}"
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}{% endif %}{% endfor %}"
    )
    talk = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": what}] for what in ("off", "on")]
    ends, runs_on = (samples(Dataset.from_list([{"messages": each}]), examples(kind="chat"), made) for each in talk)
    entered: list[bool] = []
    within = encoders.within_limits

    @contextmanager
    def counted() -> Iterator[None]:
        entered.append(True)
        with within():
            yield

    monkeypatch.setattr(encoders, "within_limits", counted)
    first, again = batches(ends, 0, 2, size=1)
    assert same([first], [again]) and len(entered) == 1
    with pytest.raises(CompressError, match="row 1: the conversation does not fit the chat template: it runs for more"):
        batches(runs_on, 0, 1, size=1)


def test_packed_windows_hold_all_documents_in_order() -> None:
    data = samples(Dataset.from_list(DOCUMENTS), examples(tokens=16), tokenizer(bos_habit=True))
    assert data.longest == 16
    (batch,) = batches(data.held_out(0.0, 0)[0], 0, 1, size=len(data))  # type: ignore[arg-type]
    assert batch.ids_BT.shape[1] == 16 and (batch.ids_BT[:, 0] == 0).all() and batch.attention_BT is None
    streamed = samples(
        Dataset.from_list(DOCUMENTS).to_iterable_dataset(), examples(tokens=16, shuffle=1), tokenizer(bos_habit=True)
    )
    in_order = torch.cat([each.ids_BT for each in batches(streamed, 0, 6)])
    text = tokenizer().decode(in_order[:, 1:].flatten())
    assert "<s>".join(row["text"] for row in DOCUMENTS).startswith(text[:200]) and len(text) > 200


def kinds() -> list[tuple[str, list[dict[str, Any]]]]:
    return [
        ("text", DOCUMENTS),
        ("prompt", PAIRS),
        ("chat", [{"messages": TURNS[: 2 * (1 + n % 2)]} for n in range(7)]),
    ]


@pytest.mark.parametrize(("kind", "rows"), kinds(), ids=lambda given: given if isinstance(given, str) else "")
@pytest.mark.parametrize("streaming", [False, True])
def test_the_order_is_the_seeds_and_a_later_start_goes_on_in_it(
    kind: Any, rows: list[dict[str, Any]], streaming: bool
) -> None:
    def data() -> TrainingData:
        there: Any = Dataset.from_list(rows)
        there = there.to_iterable_dataset() if streaming else there
        return samples(there, examples(kind=kind, shuffle=4, tokens=64), tokenizer())

    whole = batches(data(), 0, 8)
    assert same(whole, batches(data(), 0, 8)) and same(whole[5:], batches(data(), 5, 8))
    assert not same(whole, batches(data(), 0, 8, seed=1))
    assert data().fingerprint == data().fingerprint


@pytest.mark.parametrize("streaming", [False, True])
def test_every_row_is_seen_once_per_pass_and_only_rows_of_the_batch_are_tokenised(streaming: bool) -> None:
    there: Any = Dataset.from_list(PAIRS)
    data = samples(there.to_iterable_dataset() if streaming else there, examples(kind="prompt"), tokenizer())
    texts = [tokenizer().decode(row[:13]) for batch in batches(data, 0, 22, size=1) for row in batch.ids_BT]
    assert sorted(texts[:11]) == sorted(texts[11:]) and len(set(texts[:11])) == 11
    asked: list[int] = []
    inner = data._encoder  # type: ignore[attr-defined]
    data._encoder = lambda number, row: (asked.append(number), inner(number, row))[1]  # type: ignore[attr-defined]
    batches(data, 20, 21, size=1)
    assert len(asked) == 1


def test_local_files_are_read_whole_or_streamed_with_the_same_rows(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"q": row["prompt"], "a": row["response"]}) + "\n" for row in PAIRS))
    columns = {"prompt": "q", "response": "a"}
    for streaming in (False, True):
        given = Examples(source=str(file), kind="prompt", columns=columns, tokens=32, streaming=streaming, shuffle=1)
        found = sorted(
            text for batch in batches(training_data(given, tokenizer()), 0, 11, size=1) for text in learned(batch)
        )
        assert found == sorted(row["response"] + "</s>" for row in PAIRS)


def test_a_text_file_is_streamed_by_paragraphs(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"paragraph {n},\nof two lines" for n in range(20)))
    data = training_data(Examples(source=str(file), tokens=16, streaming=True, shuffle=1), tokenizer())
    text = tokenizer().decode(torch.cat([each.ids_BT for each in batches(data, 0, 3)]).flatten())
    assert text.startswith("paragraph 0,\nof two lines</s>paragraph 1,\nof two lines</s>")


def test_a_stream_that_breaks_says_so(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(PAIRS[0]) + "\n" + '{"prompt": "x", \n')
    data = Examples(
        source=str(file), kind="prompt", streaming=True, columns={"prompt": "prompt", "response": "response"}
    )
    with pytest.raises(CompressError) as caught:
        batches(training_data(data, tokenizer()), 0, 2)
    assert caught.value.code == "data.unreadable"


def test_what_cannot_be_used_is_said_with_the_columns_there_are(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"frage": "a", "antwort": "b"}])

    def refused(given: Any, **options: Any) -> CompressError:
        with pytest.raises(CompressError) as caught:
            batches(samples(given, examples(**options), tokenizer()), 0, 1, size=1)
        return caught.value

    problem = refused(rows, kind="prompt")
    assert problem.code == "data.columns" and "frage, antwort" in problem.what and "prompt" in problem.fix
    assert "does not use a column 'messages'" in refused(rows, kind="prompt", columns={"messages": "frage"}).what
    assert "row 1" in refused(Dataset.from_list([{"prompt": "a", "response": 3}]), kind="prompt").what
    assert "row 1" in refused(Dataset.from_list([{"text": None}]), tokens=4).what
    assert refused(Dataset.from_list([{"text": "x"}]), tokens=64).code == "data.too-little"
    plain = byte_tokenizer()
    with pytest.raises(CompressError, match="chat template"):
        samples(Dataset.from_list([{"messages": TURNS}]), examples(kind="chat"), plain)
    with pytest.raises(CompressError, match="no such file"):
        training_data(Examples(source=str(tmp_path / "none.jsonl")), plain)
    stream = samples(IterableDataset.from_generator(lambda: iter(PAIRS)), examples(kind="prompt"), plain)
    with pytest.raises(CompressError, match="stream cannot be split"):
        stream.held_out(0.1, 0)
