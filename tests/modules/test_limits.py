"""What a target declares: the first thing that it cannot hold, and the nearest scheme that it can."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmcompress.modules.limits import TargetLimits
from llmcompress.modules.scheme import named_scheme

STRICT = TargetLimits(
    positive_scales=True,
    scale_dtypes=frozenset({torch.float16}),
    bits=frozenset({4, 8}),
    groups=frozenset({32, 64, 128}),
    whole_rows=False,
    ragged_groups=False,
    symmetric_only=True,
    integers_only=True,
    rounded_inputs=False,
)


@pytest.mark.parametrize(
    ("scheme", "inputs", "reason"),
    [
        ("fp8_g32", 64, "floats"),
        ("int3_g32_positive", 64, "3-bit"),
        ("int4_g32_asym", 64, "zero points"),
        ("int4_g32", 64, "negative scales"),
        ("int4_channel_positive", 64, "one scale per row"),
        ("int4_g128_positive", 64, "one scale per row"),
        ("int4_g16_positive", 64, "groups of 16"),
        ("int4_g32_positive", 80, "do not divide"),
        ("int8_g32_a8token", 64, "activations"),
    ],
)
def test_each_limit_is_said(scheme, inputs, reason):
    assert reason in STRICT.problem(named_scheme(scheme), inputs)


def test_scales_of_another_dtype_are_said_once_it_is_known():
    scheme = named_scheme("int4_g32_positive")
    assert STRICT.problem(scheme, 64) is None and STRICT.problem(scheme, 64, torch.float16) is None
    assert "bfloat16" in STRICT.problem(scheme, 64, torch.bfloat16)


@pytest.mark.parametrize("scheme", ["int3_g5_asym", "fp8_g32_a8token", "nvfp4_a", "mxfp4", "int4_channel"])
def test_a_target_without_limits_takes_everything(scheme):
    assert TargetLimits().problem(named_scheme(scheme), 37) is None
    assert TargetLimits().nearest(named_scheme(scheme), 37) == named_scheme(scheme)


@pytest.mark.parametrize(
    ("scheme", "inputs", "nearest"),
    [
        ("int4_g32", 64, "int4_g32_positive"),
        ("int3_g64", 128, "int4_g64_positive"),
        ("int6_g64", 128, "int8_g64"),
        ("int4_g128_asym", 192, "int4_g64_positive"),
        ("int4_channel", 192, "int4_g64_positive"),
        ("int8_g32_a8token", 64, "int8_g32"),
    ],
)
def test_the_nearest_scheme_is_named(scheme, inputs, nearest):
    assert STRICT.nearest(named_scheme(scheme), inputs) == named_scheme(nearest)


def test_a_group_that_does_not_divide_becomes_a_shorter_one_that_does():
    assert TargetLimits(ragged_groups=False).nearest(named_scheme("int4_g128"), 11_008 + 64) == named_scheme("int4_g64")


def test_no_scheme_is_near_where_only_other_numbers_are_held():
    assert STRICT.nearest(named_scheme("nf4_g32"), 64) is None


@given(
    st.integers(2, 8),
    st.sampled_from(["channel", "g16", "g32", "g48"]),
    st.sampled_from(["", "_asym"]),
    st.integers(1, 200),
)
def test_what_is_near_can_be_held(bits, size, sign, inputs):
    found = STRICT.nearest(named_scheme(f"int{bits}_{size}{sign}"), inputs)
    assert found is None or STRICT.problem(found, inputs) is None
    assert found is not None or inputs % 32
