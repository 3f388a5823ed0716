"""The two commands that measure a saved model without a text."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from llmcompress import pipeline
from llmcompress.cli.main import main
from llmcompress.errors import ExitCode
from llmcompress.evaluation.device.cost import CostTable
from llmcompress.records.cost import Cost, Energy, MachineLimits, Memory, Rate, Speed, Traffic
from tests.tiny_text import tiny_llama

BOOKS = "builtin:books-llama"


@pytest.fixture
def run(capsys):
    """Run a command: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        written = capsys.readouterr()
        return exit_.value.code, written.out, written.err

    return call


def test_footprint_shows_what_is_stored_and_apart_from_it_what_is_theory(run):
    code, out, _ = run("footprint", BOOKS)
    assert code == 0
    assert re.search(r"parameters +2,422,848", out) and re.search(r"embedding +393,216", out)
    assert re.search(r"weight files +4\.9 MB", out)
    assert out.index("in theory: no file here is stored so") < out.index("Huffman's code")
    found = json.loads(run("footprint", BOOKS, "--json")[1])
    assert found["parameters"] == found["embedding"] + found["head"] + found["blocks"] + found["other"]


def test_footprint_against_another_model_gives_ratios(run, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    code, out, _ = run("footprint", str(tmp_path), "--against", BOOKS)
    parameters = int(re.search(r"parameters +([\d,]+)", out)[1].replace(",", ""))
    assert code == 0 and re.search(rf"2,422,848 +{parameters / 2_422_848:.3f}", out)
    found = json.loads(run("footprint", str(tmp_path), "--against", BOOKS, "--json")[1])
    assert found["ratios"]["parameters"] == pytest.approx(parameters / 2_422_848)
    assert (found["model"]["model"], found["against"]["model"]) == (str(tmp_path), BOOKS)


def test_a_model_that_is_not_there_is_told_in_words(run):
    code, out, _ = run("footprint", "builtin:none", "--json")
    assert code == json.loads(out)["error"]["exit_code"] == ExitCode.USAGE


def cost(model: str, decode: float = 20.0, *, turns: tuple[float, ...] = (), **changes: Any) -> Cost:
    speed = Speed(
        prefill=Rate.of([100.0, 95.0, 105.0]),
        decode=Rate.of(turns or [decode, 0.9 * decode, 1.1 * decode]),
        seconds_to_first_token=0.09,
        clock="wall",
    )
    found = Cost(
        model=model, runtime="torch", device="cpu", dtype="float32", threads=2, cores=(0, 1), batch=1, context=128,
        new_tokens=4, bytes_on_disk=2_000_000, speed=speed,
        memory=Memory(instrument="a mark", libraries=300_000_000, loading=400_000_000, running=450_000_000),
        traffic=Traffic(
            prefill_flops=10**9, weight_bytes=1_500_000, cache_bytes=64_000,
            matrix_rate_fraction=0.25, bandwidth_fraction=0.5,
        ),
        energy=Energy(instrument=None, unavailable="RAPL: no file"),
    )  # fmt: skip
    return found.model_copy(update=changes)


def limits() -> MachineLimits:
    return MachineLimits(device="cpu", threads=2, dtype="float32", bytes_per_second=30e9, flops_per_second=88e9)


def test_speed_passes_its_options_on_and_shows_ratios_to_the_first(run, monkeypatch):
    calls = []

    def speed(models, **options):
        calls.append((models, options))
        return CostTable(tuple(cost(name, 20.0 * (number + 1)) for number, name in enumerate(models)), (limits(),))

    monkeypatch.setattr(pipeline, "speed", speed)
    options = ["--batch", "1,4", "--context", "9", "--new-tokens", "4", "--repeats", "3", "--threads", "2"]
    code, out, _ = run("speed", "a", "b", *options, "--skip", "memory", "--runner", "torch")
    assert code == 0
    assert calls == [
        (
            ("a", "b"),
            {
                "device": "auto", "dtype": "auto", "runner": ("torch",), "batch": (1, 4), "context": (9,),
                "new_tokens": 4, "repeats": 3, "threads": 2, "skip": ("memory",),
            },
        )
    ]  # fmt: skip
    assert "cpu, float32, 2 threads, on cores 0, 1" in out and "30.0 GB/s of memory, 88 GFLOP/s in float32" in out
    assert re.search(r"b +100\.0 ±5% +40\.0 ±10% +90 ms", out)
    assert re.search(r"times as fast as a *\n.*\nb +1\.00 \(1\.00 to 1\.00\) +2\.00 \(2\.00 to 2\.00\)", out)
    found = json.loads(run("speed", "a", "--json")[1])
    assert found["rows"] == [cost("a").model_dump(mode="json")] and found["ratios"] == []
    assert found["limits"] == [limits().model_dump(mode="json")]


def test_all_costs_are_shown_in_tables_of_eighty_columns(run, monkeypatch):
    used = Energy(
        instrument="RAPL, package-0 + dram", prefill_joules_per_token=0.0123, decode_joules_per_token=1.5,
        idle_watts=(11.0, 13.0), busy_watts=60.0, seconds=5.0,
    )  # fmt: skip
    rows = [
        cost("builtin:books-llama", 12345.6, batch=batch, context=context, energy=used)
        for batch in (1, 16)
        for context in (128, 16384)
    ]
    monkeypatch.setattr(pipeline, "speed", lambda models, **options: CostTable(tuple(rows), (limits(),)))
    out = run("speed", "builtin:books-llama")[1]
    assert max(map(len, out.splitlines())) <= 80
    assert re.search(r"books-llama +16 +16384 +2\.0 MB +300\.0 MB +400\.0 MB +450\.0 MB", out)
    assert re.search(r"books-llama +1 +128 +1\.5 MB +64\.0 kB +50% +25%", out)
    assert "joules per token above idle (RAPL, package-0 + dram)" in out
    assert re.search(r"books-llama +1 +128 +0\.0123 +1\.5 +12\.0 W", out)


def test_what_could_not_be_measured_is_said_with_the_reason_and_without_a_number(run, monkeypatch):
    row = cost("a", memory=Memory(instrument=None, unavailable="ended by signal 9"), traffic=None)
    monkeypatch.setattr(pipeline, "speed", lambda models, **options: CostTable((row,)))
    out = run("speed", "a")[1]
    assert "peak memory: unavailable (ended by signal 9)" in out and "energy: unavailable (RAPL: no file)" in out
    assert "joules" not in out and "per decode step" not in out


def test_speed_against_another_model_gives_ratios_turn_by_turn(run, monkeypatch):
    rows = (cost("new", turns=(30.0, 40.0, 72.0)), cost("old", turns=(20.0, 20.0, 24.0)))
    monkeypatch.setattr(pipeline, "speed", lambda models, **options: CostTable(rows))
    assert "times as fast as old" in run("speed", "new", "--against", "old")[1]
    found = json.loads(run("speed", "new", "--against", "old", "--json")[1])
    assert found["reference"] == "old" and [row["model"] for row in found["rows"]] == ["new", "old"]
    assert found["ratios"][0]["decode"] == {"median": 2.0, "lowest": 1.5, "highest": pytest.approx(3.0)}


def test_speed_really_measures_a_model_by_its_name(run):
    quick = ["--context", "3", "--new-tokens", "2", "--repeats", "1", "--device", "cpu", "--skip", "limits"]
    (row,) = json.loads(run("speed", BOOKS, *quick, "--skip", "energy", "--json")[1])["rows"]
    assert row["speed"]["decode"]["median"] > 0 and row["memory"]["running"] > row["traffic"]["weight_bytes"]


@pytest.mark.parametrize(
    "arguments", [["speed"], ["speed", "m", "--new-tokens", "1"], ["speed", "m", "--batch", "1,0"], ["footprint"]]
)
def test_a_wrong_command_line_starts_nothing(run, arguments):
    assert run(*arguments)[0] == ExitCode.USAGE
