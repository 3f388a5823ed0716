"""Stores of levels: resumed as if nothing had happened, never mixed up, and bit for bit what the passes made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.errors import CompressError
from llmcompress.plan_search.levels import build
from llmcompress.plan_search.levels.build import build_levels
from llmcompress.plan_search.levels.encoding import decode, encode
from llmcompress.plan_search.levels.folder import block_key
from llmcompress.plan_search.levels.size import estimated_bytes
from llmcompress.plan_search.levels.store import LevelStore
from llmcompress.progress import Silent
from tests.search.levels.tiny import space_of, whole_model

WHOLE = whole_model()
SPACE = space_of(WHOLE)


class KilledAt(Silent):
    """A progress that ends the build after a block, as a kill would."""

    def __init__(self, block: int) -> None:
        self._left = block

    def step(self, text: str) -> None:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt


def hashes(folder: Path) -> dict[str, str]:
    lines = (folder / "journal.jsonl").read_text().splitlines()
    return {line["file"]: line["sha256"] for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("levels")
    build_levels(WHOLE, SPACE, LevelStore(folder))
    return folder


@pytest.mark.parametrize("block", [0, 1])
def test_a_store_killed_at_a_block_and_resumed_is_the_uninterrupted_one(
    tmp_path: Path, finished: Path, block: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_levels(WHOLE, SPACE, LevelStore(tmp_path), progress=KilledAt(block))
    assert len(hashes(tmp_path)) < len(hashes(finished))
    if block:  # the last file was torn
        path = tmp_path / "00-001.safetensors"
        path.write_bytes(path.read_bytes()[:-3])
    build_levels(WHOLE, SPACE, LevelStore(tmp_path))
    assert hashes(tmp_path) == hashes(finished)
    assert LevelStore(tmp_path).fingerprint == LevelStore(finished).fingerprint


def test_its_size_is_told_before(finished: Path) -> None:
    told = estimated_bytes(SPACE, WHOLE.context.storage_dtype)
    tensors = [tensor for info in WHOLE.map.blocks for tensor in tensor_bytes(finished, info.index)]
    assert sum(tensors) == pytest.approx(told, rel=0.1)


def tensor_bytes(folder: Path, block: int) -> list[int]:
    return [tensor.nbytes for tensor in LevelStore(folder).file(block_key(0, block)).tensors().values()]


def test_a_store_of_something_else_is_refused_and_stays(finished: Path) -> None:
    before = hashes(finished)
    other = space_of(WHOLE, sites={"dense": [], "rtn2": [{"rtn": {"scheme": "int2_g32"}}]})
    with pytest.raises(CompressError, match=r"search\.other-levels"):
        build_levels(WHOLE, other, LevelStore(finished))
    assert hashes(finished) == before


def test_a_store_that_is_not_complete_says_so(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"search\.levels-missing"):
        LevelStore(tmp_path).file("00-000")


def test_an_option_that_changes_other_modules_is_refused(tmp_path: Path) -> None:
    space = space_of(WHOLE, sites={"dense": [], "awq": [{"awq": {"scheme": "int4_g32"}}]}, bodies={"whole": []})
    with pytest.raises(CompressError, match=r"search\.not-local"):
        build_levels(WHOLE, space, LevelStore(tmp_path))


def test_an_option_that_does_not_fit_a_body_is_told_before_the_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "Sensitivities", None)
    space = space_of(WHOLE, sites={"dense": [], "rtn": [{"rtn": {"scheme": "int4_g32"}}]})
    with pytest.raises(CompressError, match=r"mlp\.down_proj: 48 inputs"):
        build_levels(WHOLE, space, LevelStore(tmp_path))


@settings(max_examples=60)
@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 19),
    seed=st.integers(0, 99),
)
def test_codes_are_read_as_they_were_written(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = -(1 << (bits - 1))
    codes = torch.randint(low, low + (1 << bits), (rows, columns), generator=generator, dtype=torch.int8)
    assert_same(codes)


@settings(max_examples=60)
@given(
    zeros=st.floats(0, 1),
    rows=st.integers(1, 9),
    columns=st.integers(1, 19),
    exact=st.booleans(),
    seed=st.integers(0, 99),
)
def test_weights_are_read_as_they_were_written(zeros: float, rows: int, columns: int, exact: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight = weight if exact else weight.bfloat16().float()
    assert_same(weight * (torch.rand(rows, columns, generator=generator) >= zeros))


def assert_same(tensor: torch.Tensor) -> None:
    encoded = encode(tensor, torch.bfloat16)
    again = decode(encoded.parts.__getitem__, encoded.form)
    assert again.dtype == tensor.dtype and again.shape == tensor.shape and torch.equal(again, tensor)
    assert sum(part.nbytes for part in encoded.parts.values()) <= tensor.nbytes + tensor.numel()
