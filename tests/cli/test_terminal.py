"""Progress: plain lines at most every half minute off a terminal, a live display on one, and an honest estimate."""

import io
import re

import pytest
from rich.console import Console

from llmcompress.cli.terminal import TerminalProgress
from llmcompress.report.forms import duration, size


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_off_a_terminal_a_line_comes_at_most_every_half_minute():
    stream, clock = io.StringIO(), Clock()
    with TerminalProgress(stream, clock=clock) as progress:
        progress.stage("compress", 12)
        for block in range(12):
            clock.now += 10
            progress.substep("gptq mlp.down_proj")
            progress.step(f"block {block + 1}/12")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "compress (12 steps)"
    assert [line.split(",")[0] for line in lines[1:-1]] == [
        "compress › gptq mlp.down_proj: block 2/12",
        "compress › gptq mlp.down_proj: block 5/12",
        "compress › gptq mlp.down_proj: block 8/12",
        "compress › gptq mlp.down_proj: block 11/12",
    ]
    assert "memory" in lines[1] and "peak" in lines[1]
    assert lines[-1].startswith("compress: 12 steps in 2:00, memory")


def test_notes_are_never_dropped_and_never_wrapped():
    stream = io.StringIO()
    with TerminalProgress(stream, clock=Clock()) as progress:
        progress.stage("compress", 1)
        progress.note("long " * 60)
        progress.note("[bold]as written")
    assert f"note: {'long ' * 60}\n" in stream.getvalue() and "note: [bold]as written\n" in stream.getvalue()


def test_the_time_left_follows_the_latest_steps():
    clock = Clock()
    progress = TerminalProgress(io.StringIO(), clock=clock)
    progress.stage("compress", 30)
    assert progress.seconds_left is None
    for _ in range(10):
        progress.step("restored")
    for _ in range(8):
        clock.now += 5
        progress.step("measured")
    assert progress.seconds_left == pytest.approx(12 * 5)
    clock.now += 3
    assert progress.seconds_left == pytest.approx(12 * 5 - 3)
    progress.stage("save", 1)
    assert progress.seconds_left is None


def test_on_a_terminal_the_display_has_two_levels_and_leaves_nothing_behind(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = Terminal(), Clock()
    with TerminalProgress(stream, clock=clock) as progress:
        progress.stage("compress", 4)
        clock.now += 7
        progress.step("block 1/4")
        progress.substep("gptq mlp.up_proj")
        progress._bars.refresh()
        shown = stream.getvalue()
        with progress.paused():
            stream.write("a question?")
    assert "block 1/4" in shown and "0:21 left" in shown and "› gptq mlp.up_proj" in shown
    assert "compress: 1 step in 0:07" in stream.getvalue()


@pytest.mark.parametrize("width", [80, 60, 40])
def test_no_status_line_wraps_and_the_time_left_is_always_seen(monkeypatch, width):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    stream, clock = Terminal(), Clock()
    with TerminalProgress(stream, clock=clock) as progress:
        progress.stage("evaluate the compressed model on wikitext", 40)
        clock.now += 7
        progress.step("builtin:evaluation, window 1/40 of a very long name")
        for done in range(1, 4):
            clock.now += 5
            progress.substep("learned_rounding: model.layers.0.self_attn.q_proj, loss 2.3", done=done, total=10)
        recorded = Console(width=width, record=True, file=io.StringIO())
        recorded.print(progress._bars.get_renderable())
    lines = recorded.export_text().splitlines()
    assert len(lines) == 2 and all(len(line.rstrip()) <= width for line in lines)
    assert "left" in lines[0] and re.search(r"\d:\d\d left", lines[0])
    assert lines[1].strip().startswith("›") and "3/10, 0:35 left" in lines[1]


def test_parts_of_a_step_are_counted_and_their_time_is_foretold():
    stream, clock = io.StringIO(), Clock()
    with TerminalProgress(stream, clock=clock) as progress:
        progress.stage("compress", 2)
        for done in range(1, 4):
            clock.now += 20
            progress.substep(f"recover: loss {3 - done / 10}", done=done, total=10)
        assert progress.substep_text() == "recover: loss 2.7, 3/10, 2:20 left"
        progress.substep("gptq mlp.up_proj")
        assert progress.substep_text() == "gptq mlp.up_proj"
        progress.substep("learned_rounding", done=2, total=4)
        assert progress.substep_text() == "learned_rounding, 2/4"
        progress.step("block 1/2")
        assert progress.substep_text() == ""
    assert "compress › recover: loss 2.8, 2/10, 2:40 left: 0:40 elapsed" in stream.getvalue()


def test_after_a_failure_no_stage_claims_to_have_finished():
    stream = io.StringIO()
    with pytest.raises(RuntimeError), TerminalProgress(stream, clock=Clock()) as progress:
        progress.stage("compress", 2)
        progress.step("block 1/2")
        raise RuntimeError
    assert "steps in" not in stream.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3600 * 3 + 427, "3:07:07")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (4_850_744, "4.9 MB"), (2.5e12, "2500.00 GB")])
def test_sizes(count, text):
    assert size(count) == text
