"""A chat template is a foreign program: it ends, and whatever it raises is a row that does not fit."""

from __future__ import annotations

import resource

import pytest

from llmcompress.calibration.sources import Texts
from llmcompress.calibration.templates import written_out
from llmcompress.errors import CompressError
from tests.tiny_text import byte_tokenizer

HELLO = Texts(name="a.jsonl", fingerprint="f", documents=(), conversations=(({"role": "user", "content": "hello"},),))


def written(template: str, **options: bool) -> tuple[list[str], int]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return written_out(HELLO, tokenizer, **options)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% for i in range(0, -(10**12), -1) %}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{% set n = 100000 %}{{ 'x' * n * n }}",
        "{{ 'x'.center(10000000000) }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_a_template_that_runs_on_or_fails_is_a_bad_row(template):
    with pytest.raises(CompressError) as caught:
        written(template)
    assert caught.value.code == "data.bad-row" and "conversation 1 does not fit the chat template" in caught.value.what
    assert written(template, skip_bad_rows=True) == ([], 1)


def test_memory_is_bounded_for_templates_alone():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(CompressError, match="it takes more than 1,000 MB of memory"):
        written("{{ 'x' * 10**10 }}")
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_ordinary_loops_are_as_they_were():
    assert written("{% for i in range(2, 8, 3) %}{{ i }},{% endfor %}{{ range(3) | list }}")[0] == ["2,5,[0, 1, 2]"]
