"""Dense scores are computed once: a second run reads what the first one kept, and checks it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from llmcompress import compress
from llmcompress.progress import Silent
from llmcompress.recipe import Recipe, parse_recipe
from llmcompress.records.report import Report, read_report
from llmcompress.runners.torch_runner import TorchRunner
from llmcompress.storage.cache import TensorCache
from llmcompress.storage.paths import cache_folder
from tests.tiny_folder import edit_tensors, write_tiny_llama

TEXT = "evaluate: {perplexity: [{source: 'builtin:evaluation', window: 48, max_windows: 3}]}"


def recipe(text: str = TEXT, scheme: str = "int4_g16") -> Recipe:
    return parse_recipe(f"passes: [{{rtn: {{scheme: {scheme}}}}}]\n{text}", "test")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    return write_tiny_llama(tmp_path / "model")


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the windows of every forward."""
    seen: list[int] = []
    logits = TorchRunner.logits
    monkeypatch.setattr(TorchRunner, "logits", lambda self, ids: (seen.append(len(ids)), logits(self, ids))[1])
    return seen


def run(model: Path, out: Path, text: str = TEXT, scheme: str = "int4_g16") -> Report:
    return compress(str(model), recipe(text, scheme), out, overwrite=True).report


def measured(report: Report) -> list[dict]:
    """All that was measured, but for the time it took."""
    kept = [each.model_dump() for each in report.measurements if each.kind != "seconds"]
    return [{key: value for key, value in each.items() if key != "from_cache"} for each in kept]


def test_a_second_run_does_not_run_the_dense_model_again_and_says_so(
    tiny: Path, tmp_path: Path, forwards: list[int]
) -> None:
    first = run(tiny, tmp_path / "out")
    assert sum(forwards) == 6, "three windows before and three after"
    second = run(tiny, tmp_path / "out")
    assert sum(forwards) == 9
    assert measured(first) == measured(second)
    assert [each.dense.from_cache for each in (*first.quality, *second.quality)] == [False, True]
    assert read_report(tmp_path / "out") == second
    other = run(tiny, tmp_path / "out", scheme="int2_g16")
    assert sum(forwards) == 12, "the recipe is of no concern to the dense model"
    assert other.quality[0].divergence.kl.mean > first.quality[0].divergence.kl.mean > 0


def test_divergence_and_paired_errors_stand_beside_the_perplexity(tiny: Path, tmp_path: Path) -> None:
    quality = run(tiny, tmp_path / "out").quality[0]
    assert quality.divergence.tokens == quality.dense.tokens == 3 * 47
    assert quality.divergence.perplexity_ratio.mean == pytest.approx(quality.ratio, rel=1e-9)
    assert 0 < quality.ratio_error < 1


@pytest.mark.parametrize("change", ["weights", "config", "windows", "bos", "text"])
def test_whatever_decides_the_scores_is_part_of_the_key(
    change: str, tiny: Path, tmp_path: Path, forwards: list[int]
) -> None:
    text = TEXT
    run(tiny, tmp_path / "out")
    before = sum(forwards)
    if change == "weights":
        edit_tensors(tiny / "model.safetensors", lm_head__weight=torch.ones(288, 32, dtype=torch.bfloat16))
    elif change == "config":
        config = (tiny / "config.json").read_text()
        (tiny / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03'))
        assert (tiny / "config.json").read_text() != config
    elif change == "windows":
        text = TEXT.replace("window: 48", "window: 47")
    elif change == "bos":
        text = TEXT.replace("max_windows: 3", "max_windows: 3, bos: always")
    else:
        (tmp_path / "other.txt").write_text("Some other text. " * 40)
        text = TEXT.replace("builtin:evaluation", str(tmp_path / "other.txt"))
    run(tiny, tmp_path / "out", text)
    assert sum(forwards) == before + 6


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_computed_again(damage: str, tiny: Path, tmp_path: Path, forwards: list[int]) -> None:
    first = run(tiny, tmp_path / "out")
    (file,) = (cache_folder() / "scores").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[-5] ^= 1
    file.write_bytes({"cut": data[: len(data) // 2], "flipped": data, "empty": b""}[damage])
    before = sum(forwards)
    second = run(tiny, tmp_path / "out")
    assert sum(forwards) == before + 6 and not second.quality[0].dense.from_cache
    assert measured(first) == measured(second)
    assert run(tiny, tmp_path / "out").quality[0].dense.from_cache


def test_a_cache_that_cannot_be_written_only_costs_time(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tiny, tmp_path / "out")
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "a file"))
    assert measured(run(tiny, tmp_path / "out")) == measured(first)


def test_without_any_text_nothing_is_kept_or_run(tiny: Path, tmp_path: Path, forwards: list[int]) -> None:
    report = run(tiny, tmp_path / "out", "evaluate: {perplexity: []}")
    assert not report.quality and not forwards and not (tmp_path / "cache").exists()
    assert report.bytes_compressed and report.seconds


def test_people_are_told(tiny: Path, tmp_path: Path) -> None:
    class Told(Silent):
        notes: list[str] = []  # noqa: RUF012

        def note(self, text: str) -> None:
            self.notes.append(text)

    run(tiny, tmp_path / "out")
    compress(str(tiny), recipe(), tmp_path / "again", progress=Told())
    assert any("cache" in note for note in Told.notes)


# ---- the cache itself


def tensors(value: float, count: int = 100) -> dict[str, torch.Tensor]:
    return {"a": torch.full((count,), value), "b": torch.zeros(2, 3, dtype=torch.int32)}


def test_what_was_put_comes_back_and_the_least_used_goes_first(tmp_path: Path) -> None:
    TensorCache(tmp_path).put("size", tensors(0))
    size = (tmp_path / "size.safetensors").stat().st_size
    cache = TensorCache(tmp_path / "c", limit_bytes=3 * size)
    for age, key in enumerate(("one", "two", "three")):
        assert cache.put(key, tensors(age))
        os.utime(tmp_path / "c" / f"{key}.safetensors", (age, age))
    assert torch.equal(cache.get("one")["a"], tensors(0)["a"]), "used now"
    assert cache.put("four", tensors(4))
    assert cache.get("two") is None and cache.get("one") is not None
    assert not cache.put("large", tensors(0, count=1000)) and cache.get("large") is None


def test_a_file_under_another_key_or_of_another_program_is_not_taken(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.put("one", tensors(1))
    shutil.copy(tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    assert torch.equal(cache.get("two")["a"], tensors(1)["a"]), "keys name contents; contents are checked"
    from safetensors.torch import save_file

    save_file(tensors(3), tmp_path / "three.safetensors")
    assert cache.get("three") is None


def test_a_reader_keeps_what_it_has_when_another_process_replaces_or_removes_it(tmp_path: Path) -> None:
    one, other = TensorCache(tmp_path), TensorCache(tmp_path)
    one.put("key", tensors(1))
    held = one.get("key")
    other.put("key", tensors(2))
    (tmp_path / "key.safetensors").unlink()
    assert torch.equal(held["a"], tensors(1)["a"])


def test_what_killed_writers_left_goes(tmp_path: Path) -> None:
    (tmp_path / "old.part").write_text("")
    os.utime(tmp_path / "old.part", (0, 0))
    (tmp_path / "new.part").write_text("")
    TensorCache(tmp_path).put("key", tensors(1))
    assert not (tmp_path / "old.part").exists() and (tmp_path / "new.part").exists()


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", "/somewhere/else")
    assert cache_folder() == Path("/somewhere/else")
    monkeypatch.delenv("LLMCOMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/llmcompress")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "llmcompress"
