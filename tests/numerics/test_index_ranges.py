"""Numbers written as ranges are the same numbers again."""

import re

import pytest
import torch

from llmcompress.numerics.index_ranges import PATTERN, read, written


@pytest.mark.parametrize("seed", range(5))
def test_what_is_written_is_read_again(seed: int) -> None:
    numbers = torch.randint(0, 40, (15,), generator=torch.Generator().manual_seed(seed)).tolist()
    text = written(numbers)
    assert re.match(PATTERN, text)
    assert read(text) == sorted(set(numbers))


def test_neighbours_are_one_range() -> None:
    assert written([7, 0, 1, 2, 3]) == "0-3, 7"
    assert written([]) == "" and read("") == []


@pytest.mark.parametrize("text", ["a", "1-", "1,,2", "-3"])
def test_other_texts_do_not_match(text: str) -> None:
    assert not re.match(PATTERN, text)
