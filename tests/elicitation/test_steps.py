"""Steps that make examples: what each keeps and drops, by slow loops and by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from llmcompress.calibration import hub_datasets
from llmcompress.elicitation.authors import Author, Authors, Drawing
from llmcompress.elicitation.base import STEPS, DataStep, Row
from llmcompress.elicitation.bm25 import BM25, words
from llmcompress.elicitation.chain import make_rows
from llmcompress.elicitation.steps.self_chat import turns
from llmcompress.errors import CompressError
from llmcompress.loading.load import load
from llmcompress.progress import Silent
from tests.tiny_folder import write_tiny_llama

CPU = torch.device("cpu")
PROMPTS = ("the fox", "the dog", "a model reads", "jump over it")


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> Author:
    folder = tmp_path_factory.mktemp("author") / "model"
    write_tiny_llama(folder, dtype=torch.float32, max_position_embeddings=256)
    model, tokenizer = load(folder)
    return Author(model.eval(), tokenizer, CPU)


class Said(Author):
    """Writes what it was told to, in turn."""

    def __init__(self, texts: Sequence[str]) -> None:
        object.__setattr__(self, "texts", list(texts))

    def continued(self, prompts: Sequence[str], how: Drawing) -> list[str]:
        self.asked = getattr(self, "asked", [])
        object.__getattribute__(self, "asked")
        return [self.texts.pop(0) for _ in prompts]  # type: ignore[attr-defined]


def run(steps: Sequence[DataStep], author: Author, folder: Path | None = None, seed: int = 0) -> list[Row]:
    return make_rows(steps, Authors(lambda _: author), seed=seed, folder=folder, progress=Silent())


def step(name: str, **options: Any) -> DataStep:
    return STEPS[name].model_validate(options)


def prompts(*texts: str) -> DataStep:
    return step("prompts", texts=list(texts or PROMPTS))


def rows(tmp_path: Path, *found: Row) -> DataStep:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return step("read", source=str(file))


def test_losses_are_those_of_the_response_alone(author: Author) -> None:
    found = author.losses(["the fox", ""], ["jumps over", "a dog"])
    tokenizer = author.tokenizer
    for prompt, response, loss in zip(["the fox", ""], ["jumps over", "a dog"], found, strict=True):
        before = tokenizer(prompt)["input_ids"] if prompt else [tokenizer.bos_token_id]
        ids = torch.tensor([*before, *tokenizer(response)["input_ids"]])
        with torch.no_grad():
            logits = author.model(ids[None]).logits[0, :-1]
        each = functional.cross_entropy(logits, ids[1:], reduction="none")
        assert loss == pytest.approx(float(each[len(before) - 1 :].mean()), rel=1e-5)


def test_the_same_seed_writes_the_same_text_and_zero_temperature_the_likeliest(author: Author) -> None:
    first, again, other = (author.continued(["the fox"] * 2, Drawing(12, 1.0, seed)) for seed in (1, 1, 2))
    assert first == again != other
    greedy = author.continued(["the fox"] * 2, Drawing(12, 0.0, 1))
    ids = author.tokenizer("the fox", return_tensors="pt")["input_ids"]
    padding = list(range(len(author.tokenizer), author.model.config.vocab_size))  # rows without a token
    wanted = author.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1, suppress_tokens=padding)[
        0, ids.shape[1] :
    ]
    assert greedy == [author.tokenizer.decode(wanted, skip_special_tokens=True)] * 2


def test_generated_and_labelled_rows_belong_to_the_model_and_its_prompts(author: Author) -> None:
    texts = run([step("generate", count=5, tokens=8, batch=2)], author)
    assert len(texts) == 5 and len({row["text"] for row in texts}) > 1
    labelled = run([prompts(), step("label", tokens=8, batch=3)], author)
    assert [row["prompt"] for row in labelled] == list(PROMPTS) and all(row["response"] for row in labelled)
    with pytest.raises(CompressError, match="no text in the column 'prompt'"):
        run([step("generate", count=1, tokens=4), step("label")], author)
    with pytest.raises(CompressError, match="leaves no room"):
        run([prompts(), step("label", tokens=300)], author)
    with pytest.raises(CompressError) as caught:
        run([prompts(), step("label", form="chat", tokens=4)], author)
    assert caught.value.code == "data.no-chat-template"


def test_chat_rows_hold_the_whole_conversation() -> None:
    said = Said([" blue.", "", "because."])
    said.__dict__["chat"] = lambda system, prompt: f"{system}|{prompt}"
    found = run([prompts("sky?", "sea?", "why?"), step("explain", form="chat", messages=["Think."], batch=3)], said)
    assert [row["messages"] for row in found] == [
        [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
        for prompt, answer in (("sky?", "blue."), ("why?", "because."))
    ]


def test_explanations_are_asked_for_by_a_message_that_the_student_sees() -> None:
    found = run([prompts("sky?"), step("explain", messages=["Think."])], Said([" blue"]))
    assert found == [{"prompt": "Think.\n\nsky?", "response": " blue"}]


def test_new_instructions_are_kept_when_they_resemble_no_other() -> None:
    said = Said([" name the seven seas\nTask 5: no", "name the seven seas", "x", "describe a day at work", "list it"])
    found = run([prompts("tell a tale of two cities"), step("expand", count=2, attempts=2, batch=1)], said)
    texts = [row["prompt"] for row in found]
    assert texts == ["tell a tale of two cities", "name the seven seas", "describe a day at work"]
    assert len(said.texts) == 1, "nothing is asked when all are there"  # type: ignore[attr-defined]


def test_similar_rows_are_dropped_by_the_longest_common_subsequence(tmp_path: Path, author: Author) -> None:
    given = ["a b c d e f g h i j", "a b c d e f g x y z", "a b c d e f q x y z", "k l m"]
    found = run([rows(tmp_path, *({"prompt": each} for each in given)), step("filter_similar", similarity=0.7)], author)
    assert [row["prompt"] for row in found] == [given[0], given[2], given[3]]


def test_perplexity_and_difficulty_are_the_papers_formulas(tmp_path: Path, author: Author) -> None:
    given = [{"prompt": "the fox", "response": "jumps"}, {"prompt": "the quick", "response": "brown fox"}]
    judged = run([rows(tmp_path, *given), step("filter_perplexity", highest=1e9)], author)
    wanted = author.losses(["the fox", "the quick"], ["jumps", "brown fox"])
    assert [row["perplexity"] for row in judged] == pytest.approx([math.exp(each) for each in wanted], rel=1e-6)
    (text,) = run([rows(tmp_path, {"text": "a dog"}), step("filter_perplexity", highest=1e9)], author)
    assert text["perplexity"] == pytest.approx(math.exp(author.losses([""], ["a dog"])[0]))
    middle = min(row["perplexity"] for row in judged)
    kept = run([rows(tmp_path, *given), step("filter_perplexity", highest=middle)], author)
    assert kept == [row for row in judged if row["perplexity"] <= middle]
    alone = author.losses(["", ""], ["jumps", "brown fox"])
    ratios = [one / other for one, other in zip(wanted, alone, strict=False)]
    chosen = run([rows(tmp_path, *given[:2]), step("filter_difficulty", fraction=0.5, highest=100)], author)
    assert [row["difficulty"] for row in chosen] == pytest.approx([max(ratios)])
    assert chosen[0]["prompt"] == given[ratios.index(max(ratios))]["prompt"]
    chosen = run([rows(tmp_path, *given[:2]), step("filter_difficulty", fraction=0.5, highest=max(ratios))], author)
    assert [row["difficulty"] for row in chosen] == pytest.approx([min(ratios)])


def test_bm25_is_its_formula_and_finds_the_passage(tmp_path: Path, author: Author) -> None:
    passages = ["the whale is a fish they said", "rain falls from clouds", "the ship, the ship! the sea"]
    index = BM25(passages)
    counts = [words(each) for each in passages]
    mean = sum(map(len, counts)) / 3
    for query in ("the ship", "rain of whale", "nothing"):
        for number, score in enumerate(index.scores(query)):
            total = 0.0
            for word in words(query):
                n, tf = sum(word in each for each in counts), counts[number].count(word)
                idf = math.log(1 + (3 - n + 0.5) / (n + 0.5))
                total += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(counts[number]) / mean))
            assert score == pytest.approx(total)
    assert index.best("a ship at sea", 2) == [2, 0]
    file = tmp_path / "passages.txt"
    file.write_text("the ship sails on. rain falls from clouds")
    found = run([prompts("why rain?"), step("retrieve", source=str(file), words=4)], author)
    assert found == [{"prompt": "rain falls from clouds\n\nwhy rain?", "question": "why rain?"}]


def test_conversations_are_cut_into_turns_that_end_with_an_answer() -> None:
    text = "[|Human|] hi\n[|AI|] hello\n[|Human|] bye [|AI|] see you\n[|Human|] more"
    assert [turn["content"] for turn in turns(text)] == ["hi", "hello", "bye", "see you"]
    assert turns("[|Human|] hi [|AI|]  ") == [] and turns("[|AI|] hi") == []
    found = run([prompts("hi", "ho"), step("self_chat", form="text")], Said([" hello [|Human|] more", "  "]))
    assert found == [{"text": "[|Human|] hi\n[|AI|] hello"}]
    found = run([prompts("hi"), step("self_chat")], Said(["hello"]))
    assert found == [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}]


def test_the_best_and_the_worst_answer_are_ranked_by_the_teachers_likelihood(author: Author) -> None:
    (found,) = run([prompts("the quick"), step("rank", answers=5, tokens=6)], author)
    answers = author.continued(["the quick"] * 5, Drawing(6, 1.0, 1_000_003 * 1))
    losses = dict(zip(answers, author.losses(["the quick"] * 5, answers), strict=True))
    assert found == {
        "prompt": "the quick",
        "chosen": min(losses, key=losses.__getitem__),
        "rejected": max(losses, key=losses.__getitem__),
    }
    assert not _left([prompts("the quick"), step("rank", answers=3, temperature=0, tokens=4)], author)


def _left(steps: Sequence[DataStep], author: Author) -> list[Row]:
    """Rows, where having none is no error."""
    try:
        return run(steps, author)
    except CompressError as error:
        assert error.code == "data.empty"
        return []


def test_columns_become_prompts_by_a_template_without_empty_paragraphs(tmp_path: Path, author: Author) -> None:
    given = [
        {"instruction": "sum", "input": "1 2", "output": "3"},
        {"instruction": "sing", "input": "", "output": "la"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    template = "Do: {instruction}\n\nWith:\n{input}\n\nAnswer:"
    (first, second) = run([step("read", source=str(file), prompt=template, response="{output}")], author)
    assert first["prompt"] == "Do: sum\n\nWith:\n1 2\n\nAnswer:" and first["response"] == "3"
    assert second["prompt"] == "Do: sing\n\nAnswer:"
    assert len(run([step("read", source=str(file), most=1)], author)) == 1


def test_bundled_texts_are_read_too(author: Author) -> None:
    (row,) = run([step("read", source="builtin:calibration")], author)
    assert row.keys() == {"text"} and len(row["text"]) > 10_000


def test_a_large_dataset_is_streamed_as_far_as_its_limit_and_refused_without(
    author: Author, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, asked = [], []

    def streamed(path: str, config: str | None, *, split: str, streaming: bool) -> Iterator[Row]:
        asked.append((path, config, split, streaming))
        for number in range(100):
            taken.append(number)
            yield {"text": f"document {number}", "url": None}

    monkeypatch.setattr("datasets.load_dataset", streamed)
    monkeypatch.setattr(hub_datasets, "hub_reachable", lambda: True)
    assert run([step("read", source="c4", most=3)], author) == [{"text": f"document {number}"} for number in range(3)]
    assert asked == [("allenai/c4", "en", "train", True)] and len(taken) < 5
    with pytest.raises(CompressError) as refused:
        run([step("read", source="c4")], author)
    assert refused.value.code == "data.endless" and "`most`" in (refused.value.fix or "")


def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, author: Author) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(CompressError, match=r"rows\.jsonl: .*2") as refused:
        run([step("read", source=str(file))], author)
    assert refused.value.code == "data.bad-row"


def test_written_rows_can_be_read_again(tmp_path: Path, author: Author) -> None:
    file = tmp_path / "new" / "made.jsonl"
    made = run([prompts(), step("write", file=str(file))], author)
    assert run([step("read", source=str(file))], author) == made == [{"prompt": text} for text in PROMPTS]


def test_a_chain_killed_at_any_unit_goes_on_to_the_same_rows(tmp_path: Path, author: Author) -> None:
    steps = [prompts(), step("label", tokens=6, batch=2), step("filter_similar", column="response", similarity=1.0)]
    whole = run(steps, author, tmp_path / "whole")
    for file in sorted((tmp_path / "whole").iterdir()):
        data = file.read_bytes()
        for cut in {0, 1, len(data) // 2, len(data) - 1}:
            part = tmp_path / f"{file.stem}-{cut}"
            part.mkdir()
            for other in sorted((tmp_path / "whole").iterdir()):
                if other.name < file.name:
                    (part / other.name).write_bytes(other.read_bytes())
            (part / file.name).write_bytes(data[:cut])
            assert run(steps, author, part) == whole
    assert run(steps, Said([]), tmp_path / "whole") == whole, "nothing is written again"
