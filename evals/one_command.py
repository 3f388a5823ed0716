"""The one command of docs/publishing.md, from a dense model to a published one, with a double of the Hub on loopback.

    python evals/one_command.py                                       # the bundled model, its own texts
    python evals/one_command.py --model DIR --text calibration.txt --judged test.txt --steps 20

The words are those of the page; only the model, the texts and the length of the training are put in. Afterwards the
model is verified by its id with `--deep`, and pushed again, which publishes nothing. Exit code 1 when one fails.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click

from llmcompress.evaluation.environment import machine, versions
from tests.hub.server import TOKEN, HubDouble

PAGE = Path(__file__).resolve().parent.parent / "docs" / "publishing.md"
COMMAND = re.compile(r"^llmcompress compress .* --preset w4-heal .*$", re.MULTILINE)


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--text", default="builtin:calibration", show_default=True, help="What it is calibrated and healed on.")
@click.option("--judged", default="builtin:evaluation", show_default=True, help="What perplexity is measured on.")
@click.option("--samples", default=64, show_default=True)
@click.option("--tokens", default=512, show_default=True, help="Of a sample.")
@click.option("--windows", default=16, show_default=True, help="Of 512 tokens, on which perplexity is measured.")
@click.option("--steps", default=20, show_default=True, help="Of the training.")
@click.option("--rows", type=click.Path(path_type=Path), help="Where to write the result.")
def main(
    model: str, text: str, judged: str, samples: int, tokens: int, windows: int, steps: int, rows: Path | None
) -> None:
    """Run it."""
    found = COMMAND.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None, f"{PAGE.name} has no such command"
    program, command, _, *words = shlex.split(found[0])
    name, output = words[words.index("--publish") + 1], words[words.index("-o") + 1]
    quick = {
        "calibration.source": text,
        "calibration.samples": str(samples),
        "calibration.tokens": str(tokens),
        "passes.qat.training.steps": str(steps),
        "evaluate.perplexity": json.dumps([{"source": judged, "window": 512, "max_windows": windows}]),
    }
    changed = [word for key, value in quick.items() for word in ("--set", f"{key}={value}")]
    with tempfile.TemporaryDirectory() as scratch, HubDouble().running() as hub:
        place = Path(scratch)
        told = _timed([program, command, model, *words, *changed], place, hub)
        report = json.loads((place / output / "llmcompress_report.json").read_text(encoding="utf-8"))
        verified = _timed([program, "verify", name, "--deep"], place, hub)
        commits = len(hub.repos[name].commits)
        again = _timed([program, "push", output, name, "--also", f"{output}-gguf"], place, hub)
        files = {path: len(content) for path, content in sorted(hub.repos[name].files.items())}
        card = hub.repos[name].files["README.md"].decode()
        same = len(hub.repos[name].commits) == commits
    facts = {
        "command": found[0],
        "model": Path(model).name,
        "text": "/".join(Path(text).parts[-2:]),
        "judged": "/".join(Path(judged).parts[-2:]),
        "samples": samples,
        "tokens": tokens,
        "windows": windows,
        "steps": steps,
        "seconds": told,
        "seconds_of_verify_deep": verified,
        "seconds_of_the_same_push_again": again,
        "perplexities": {
            each["of"]: each["perplexity"] for each in report["measurements"] if each["kind"] == "perplexity"
        },
        "files": files,
        "versions": versions(),
        "machine": machine(),
        "pushed_again_makes_no_commit": same,
    }
    if rows:
        rows.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{card}\n{json.dumps(facts, indent=1)}")
    sys.exit(not same)


def _timed(words: Sequence[str], place: Path, hub: HubDouble) -> float:
    """Seconds of a command as a user types it.

    Raises: SystemExit with what it said, when it fails.
    """
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(place / "home"),
        "HF_TOKEN": TOKEN,
        "LLMCOMPRESS_CACHE": str(place / "cache"),
    }
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=place, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    )
    click.echo(done.stderr, err=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return round(time.monotonic() - began, 1)


if __name__ == "__main__":
    main()
