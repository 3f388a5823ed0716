"""Threads and cores are chosen for a measurement, told, and given back."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from llmcompress.evaluation.device.pinning import cores_for, pinned


@pytest.fixture
def affinity(monkeypatch: pytest.MonkeyPatch) -> dict[int, set[int]]:
    """A machine of four cores, whatever this one has: where its threads are."""
    where: dict[int, set[int]] = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: where.get(thread, {0, 1, 2, 3}), raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cores: where.update({thread: cores}), raising=False)
    return where


def test_cores_that_share_nothing_come_first(tmp_path: Path) -> None:
    for core, siblings in enumerate(("0,4", "1,5", "2-3", "2-3", "0,4", "1,5")):
        file = tmp_path / f"cpu{core}" / "topology" / "thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(f"{siblings}\n")
    assert cores_for(3, range(6), root=tmp_path) == (0, 1, 2)
    assert cores_for(4, range(6), root=tmp_path) == (0, 1, 2, 3)
    assert cores_for(2, [3, 4, 5], root=tmp_path) == (3, 4), "of the cores that this process may use"
    assert cores_for(9, [0, 1], root=tmp_path / "unknown") == (0, 1)


def test_every_thread_is_pinned_and_given_back(affinity: dict[int, set[int]]) -> None:
    before = torch.get_num_threads()
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        with pinned(2) as told:
            assert (told.threads, told.cores, torch.get_num_threads()) == (2, (0, 1), 2)
            assert affinity[other.native_id] == {0, 1} and len(affinity) >= 2
        assert set(map(frozenset, affinity.values())) == {frozenset(range(4))}
        assert torch.get_num_threads() == before
    finally:
        done.set()
        other.join()


def test_where_nothing_can_be_pinned_the_reason_is_told(
    affinity: dict[int, set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pinned(4) as told:
        assert told.cores is None and told.reason == "4 threads and 4 cores" and not affinity
    monkeypatch.delattr(os, "sched_setaffinity")
    with pinned(1) as told:
        assert (told.threads, told.cores) == (1, None) and "no call" in told.reason
