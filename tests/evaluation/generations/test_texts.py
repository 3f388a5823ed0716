"""Statistics of texts by hand, and prompts of every form."""

from __future__ import annotations

import json

import pytest

from llmcompress.errors import CompressError
from llmcompress.evaluation.generations.prompts import read_prompts, tokens_of
from llmcompress.evaluation.generations.statistics import distinct, repetition, rouge_l
from tests.tiny_text import byte_tokenizer


def test_repetition_is_the_fraction_of_groups_that_stood_before():
    assert repetition("a b c d e f") == 0.0
    assert repetition("a b a b a b", words=2) == pytest.approx(3 / 5)  # ab ba ab ba ab
    assert repetition("a a a a a a a a") == pytest.approx(4 / 5)
    assert repetition("too short") == 0.0


def test_distinct_counts_over_all_texts():
    assert distinct(["a b a", "a c"], 1) == pytest.approx(3 / 5)
    assert distinct(["a b a", "a b"], 2) == pytest.approx(2 / 3)
    assert distinct([""], 1) == 0.0


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    found = rouge_l(["the cat sat on the mat", "", "same"], ["the cat on a mat", "", "same"])
    # 4 words in common of 6 and 5: precision 4/5, recall 4/6
    assert found == pytest.approx([2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6), 1.0, 1.0])


ROWS = [
    ({"prompt": "Go on"}, "Go on"),
    ({"text": "Go on"}, "Go on"),
    ({"turns": ["First", "second"]}, "First"),
    ({"instruction": "Do it.", "instances": [{"input": "This", "output": "x"}]}, "Do it.\n\nThis"),
    ({"instruction": "Do it.", "instances": [{"input": ""}]}, "Do it."),
    ({"instruction": "Do it.", "input": "This", "output": "x"}, "Do it.\n\nThis"),
    ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Hi"}]}, "Hi"),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x"}]}, "Hi"),
]


@pytest.mark.parametrize(("row", "wanted"), ROWS)
def test_prompts_are_found_in_every_usual_form(tmp_path, row, wanted):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    assert [each.text for each in read_prompts(str(tmp_path / "rows.jsonl"), 1)] == [wanted]


def test_a_row_without_a_prompt_is_refused_naming_its_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Go on"}\n{"answer": "x"}\n')
    with pytest.raises(CompressError, match="line 2"):
        read_prompts(str(tmp_path / "rows.jsonl"), None)


def test_bundled_prompts_have_verifiable_instructions():
    prompts = read_prompts("builtin:prompts", None)
    assert len(prompts) == 16 and sum(bool(each.checks) for each in prompts) == 9


def test_a_chat_template_is_used_where_asked_for():
    tokenizer = byte_tokenizer(bos_habit=True)
    tokenizer.chat_template = "{{ messages[0].content }}|"
    prompt = read_prompts("builtin:prompts", 1)[0]
    assert tokenizer.decode(tokens_of(prompt, tokenizer, chat=True)) == f"{prompt.text}|"
    assert tokenizer.decode(tokens_of(prompt, tokenizer, chat=False)) == f"<s>{prompt.text}"
