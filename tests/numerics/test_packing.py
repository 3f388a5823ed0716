"""Codes packed to their own width come back bit for bit."""

from __future__ import annotations

import pytest
import torch

from llmcompress.numerics.packing import (
    pack_bits,
    pack_trits,
    packed_bytes,
    packed_trit_bytes,
    unpack_bits,
    unpack_trits,
)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 32), (2, 129)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_come_back_from_exactly_their_own_bits(bits: int, shape: tuple[int, int], symmetric: bool) -> None:
    low = -(2 ** (bits - 1)) if symmetric else 0
    high = min(low + 2**bits, 128)
    codes = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed = pack_bits(codes, bits, low)
    assert packed.dtype == torch.uint8 and packed.shape == (shape[0], -(-shape[1] * bits // 8))
    assert packed.shape[1] == packed_bytes(shape[1], bits)
    assert torch.equal(unpack_bits(packed, bits, low, shape[1]), codes)


def test_the_lowest_bit_stands_first() -> None:
    packed = pack_bits(torch.tensor([[1, 2, 3]], dtype=torch.int8), 3, 0)
    assert packed.tolist() == [[0b11_010_001, 0b0]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 32), (2, 129)])
def test_ternary_codes_come_back_from_a_byte_for_every_five(shape: tuple[int, int]) -> None:
    codes = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed = pack_trits(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (shape[0], -(-shape[1] // 5))
    assert packed.shape[1] == packed_trit_bytes(shape[1])
    assert torch.equal(unpack_trits(packed, shape[1]), codes)


def test_the_first_ternary_code_is_the_lowest_digit() -> None:
    assert pack_trits(torch.tensor([[1, 0, -1, -1, 1, 1]], dtype=torch.int8)).tolist() == [[2 + 3 + 2 * 81, 2]]
