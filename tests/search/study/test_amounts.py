"""Limits as people write them."""

from __future__ import annotations

import pytest

from llmcompress.errors import CompressError
from llmcompress.plan_search.amounts import Amount, read_amount


@pytest.mark.parametrize(
    ("text", "axis", "value"),
    [
        ("60MB", "bytes", 60e6),
        ("1.5 GB", "bytes", 1.5e9),
        ("2MiB", "bytes", 2.0**21),
        ("1024", "bytes", 1024.0),
        ("50ms/token", "decode", 0.05),
        ("50 ms", "decode", 0.05),
        ("20 tokens/s", "decode", 0.05),
        ("0.4J/token", "energy", 0.4),
    ],
)
def test_an_amount_is_read_in_its_unit(text: str, axis: str, value: float) -> None:
    assert read_amount(text, axis) == Amount(pytest.approx(value))


def test_a_share_is_of_the_dense_model() -> None:
    assert read_amount("0.25x", "bytes").of(400.0) == 100.0


@pytest.mark.parametrize(
    ("text", "axis"), [("60ms", "bytes"), ("6MB/token", "decode"), ("-3MB", "bytes"), ("", "energy")]
)
def test_anything_else_is_refused_with_an_example(text: str, axis: str) -> None:
    with pytest.raises(CompressError, match=r"write e\.g\."):
        read_amount(text, axis)
