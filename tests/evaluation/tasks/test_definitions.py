"""Where tasks and their data are found, and what is told when they are not."""

from __future__ import annotations

import json
import sys

import pytest
import yaml

from llmcompress.errors import CompressError
from llmcompress.evaluation.tasks.definitions import TaskLoader, bundled_tasks, require_lm_eval
from scripts.write_word_order_task import TASK, TEXT, rows

ROWS = {
    "choices": {"ctx": "Question: 1?\nAnswer:", "choices": ["2", "3"], "gold": 1},
    "target": {"ctx": "Once upon a", "target": "time"},
    "ctxs": {"ctxs": ["A", "B"], "continuation": "goes on.", "gold": 0},
    "sentence_good": {"sentence_good": "It is.", "sentence_bad": "It are."},
    "text": {"text": "Once upon a time"},
}
"""What files hold, by a column that tells them apart."""


def files_of(definition: dict) -> list[str]:
    members = definition["task"] if isinstance(definition["task"], list) else [definition]
    return [member["dataset_kwargs"]["data_files"]["test"] for member in members]


@pytest.mark.parametrize("name", sorted(set(bundled_tasks()) - {"builtin_word_order"}))
def test_bundled_tasks_find_their_data_in_the_folder_given(name, tmp_path):
    written = bundled_tasks()[name].read_text()
    definition = {"task": None, **yaml.safe_load(written)}
    row = next(row for column, row in ROWS.items() if column in written.split("\n", 2)[1])
    with pytest.raises(CompressError, match="set `data`") as caught:
        TaskLoader().load(name, data=str(tmp_path))
    assert caught.value.code == "tasks.no-data"
    for file in files_of(definition):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps(row) + "\n")
    found = TaskLoader().load(name, data=str(tmp_path))
    assert len(found.tasks) == len(files_of(definition)) and set(found.groups) <= {name}
    task = next(iter(found.tasks.values()))
    (document,) = task.eval_docs
    request = task.construct_requests(
        document, task.doc_to_text(document) if name != "local_winogrande" else ["A", "B"]
    )
    first = request[0] if isinstance(request, list) else request
    assert first.args[1].startswith(" ")


def test_the_bundled_task_is_made_from_the_bundled_text():
    text = TEXT.read_text()
    made = rows(text)
    assert [json.loads(line) for line in TASK.read_text().splitlines()] == made
    # of the four orders the text has the right one only
    words = " ".join(text.split())
    assert all([choice in words for choice in row["choices"]].index(True) == row["gold"] for row in made)
    assert all(sum(choice in words for choice in row["choices"]) == 1 for row in made)


def test_a_task_file_with_its_data_beside_it_needs_no_folder(tmp_path):
    definition = yaml.safe_load(bundled_tasks()["builtin_word_order"].read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**definition, "task": "mine"}))
    (tmp_path / "builtin_word_order.jsonl").write_text(TASK.read_text())
    assert list(TaskLoader().load(str(tmp_path / "mine.yaml"), data=None).tasks) == ["mine"]


@pytest.mark.parametrize(("text", "code"), [("a: [", "tasks.bad-file"), ("doc_to_text: x", "tasks.bad-file")])
def test_a_file_that_is_no_task_is_refused(tmp_path, text, code):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(CompressError) as caught:
        TaskLoader().load(str(tmp_path / "mine.yaml"), data=None)
    assert caught.value.code == code


def test_an_unknown_task_is_refused_naming_the_nearest_of_lm_eval_and_of_ours(monkeypatch):
    class Index:
        task_index = {"arc_easy": None}  # noqa: RUF012
        all_tasks = ("arc_easy", "hellaswag")

        def __init__(self, include_defaults: bool) -> None:
            assert include_defaults

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Index)
    for wrong, right in (("helaswag", "hellaswag"), ("builtin_wordorder", "builtin_word_order")):
        with pytest.raises(CompressError, match=right) as caught:
            TaskLoader().load(wrong, data=None)
        assert caught.value.code == "tasks.unknown"


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(CompressError, match=r"llmcompress\[eval\]"):
        require_lm_eval()
