"""The one command of docs/publishing.md, from a dense model to a published one, with a double of the Hub on loopback.

    python evals/one_command.py                                       # the bundled model, its own texts
    python evals/one_command.py --model DIR --text calibration.txt --judged test.txt --steps 20 --beside

The words are those of the page; only the model, the texts and the length of the training are put in. Afterwards the
model is verified by its id with `--deep`, and pushed again, which publishes nothing. `--beside` compresses the model
twice more, by the same recipe without healing and by the preset `w4`, on the same texts, and measures beside both what
was published. Exit code 1 when one fails.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import yaml

from llmcompress.evaluation.environment import machine, versions
from llmcompress.records.report import Report, read_report
from tests.hub.server import TOKEN, HubDouble

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "publishing.md"
PRESET = "w4-heal"
COMMAND = re.compile(rf"^llmcompress compress .* --preset {PRESET} .*$", re.MULTILINE)


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--text", default="builtin:calibration", show_default=True, help="What it is calibrated and healed on.")
@click.option("--judged", default="builtin:evaluation", show_default=True, help="What perplexity is measured on.")
@click.option("--samples", default=64, show_default=True)
@click.option("--tokens", default=512, show_default=True, help="Of a sample.")
@click.option("--windows", default=16, show_default=True, help="Of 512 tokens, on which perplexity is measured.")
@click.option("--steps", default=20, show_default=True, help="Of the training.")
@click.option("--beside", is_flag=True, help="Compress without healing too, and compare.")
@click.option("--rows", type=click.Path(path_type=Path), help="Where to write the result.")
def main(
    model: str,
    text: str,
    judged: str,
    samples: int,
    tokens: int,
    windows: int,
    steps: int,
    beside: bool,
    rows: Path | None,
) -> None:
    """Run it."""
    found = COMMAND.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None, f"{PAGE.name} has no such command"
    program, command, _, *words = shlex.split(found[0])
    name, output = words[words.index("--publish") + 1], words[words.index("-o") + 1]
    texts = {
        "calibration.source": text,
        "calibration.samples": str(samples),
        "calibration.tokens": str(tokens),
        "evaluate.perplexity": json.dumps([{"source": judged, "window": 512, "max_windows": windows}]),
    }
    changed = _set({**texts, "passes.qat.training.steps": str(steps)})
    with tempfile.TemporaryDirectory() as scratch, HubDouble().running() as hub:
        place = Path(scratch)
        told = _timed([program, command, model, *words, *changed], place, hub)
        cpu = _cpu_seconds()
        report = read_report(place / output)
        verified = _timed([program, "verify", name, "--deep"], place, hub)
        commits = len(hub.repos[name].commits)
        again = _timed([program, "push", output, name, "--also", f"{output}-gguf"], place, hub)
        files = {path: len(content) for path, content in sorted(hub.repos[name].files.items())}
        card = hub.repos[name].files["README.md"].decode()
        same = len(hub.repos[name].commits) == commits
        others = _beside(place, hub, model, output, texts, windows) if beside else {}
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
        "cpu_seconds": cpu,
        "seconds_of_verify_deep": verified,
        "seconds_of_the_same_push_again": again,
        "published": _quality(report),
        "beside": others,
        "files": files,
        "versions": versions(),
        "machine": machine(),
        "pushed_again_makes_no_commit": same,
    }
    if rows:
        rows.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{card}\n{json.dumps(facts, indent=1)}")
    sys.exit(not same)


def _beside(
    place: Path, hub: HubDouble, model: str, healed: str, texts: Mapping[str, str], windows: int
) -> dict[str, dict[str, float]]:
    """What other recipes lose on the same texts, and how what was published differs from their models."""
    recipe = yaml.safe_load((ROOT / "configs" / "recipes" / f"{PRESET}.yaml").read_text(encoding="utf-8"))
    recipe["passes"] = [each for each in recipe["passes"] if "qat" not in each]
    (place / "unhealed.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    found = {}
    for name, by in (("without qat", ("--recipe", "unhealed.yaml")), ("w4", ("--preset", "w4"))):
        folder = name.replace(" ", "-")
        seconds = _timed(["llmcompress", "compress", model, *by, "-o", folder, *_set(texts)], place, hub)
        judged = json.loads(texts["evaluate.perplexity"])[0]["source"]
        measured = ("--perplexity", judged, "--window", "512", "--max-windows", str(windows), "-o", f"{folder}-report")
        _timed(["llmcompress", "evaluate", healed, "--baseline", folder, *measured], place, hub)
        compared = json.loads((place / f"{folder}-report" / "report.json").read_text(encoding="utf-8"))
        increase = next(each for each in compared["measurements"] if each["kind"] == "divergence")["loss_increase"]
        found[name] = {
            **_quality(read_report(place / folder)),
            "seconds": seconds,
            "published_minus_this_nats": increase["mean"],
            "published_minus_this_nats_error": increase["standard_error"],
        }
    return found


def _quality(report: Report) -> dict[str, float]:
    """On the judged text."""
    (quality,) = report.quality
    assert quality.divergence is not None and quality.divergence.kl.standard_error is not None
    return {
        "bytes": float(report.bytes_compressed),
        "perplexity_dense": quality.dense.perplexity,
        "perplexity": quality.compressed.perplexity,
        "ratio": quality.ratio,
        "ratio_error": quality.ratio_error or 0.0,
        "kl": quality.divergence.kl.mean,
        "kl_error": quality.divergence.kl.standard_error,
    }


def _set(values: Mapping[str, str]) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def _cpu_seconds() -> float:
    """Of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(used.ru_utime + used.ru_stime, 1)


def _timed(words: Sequence[str], place: Path, hub: HubDouble) -> float:
    """Seconds of a command as a user types it.

    Raises: SystemExit with what it said, when it fails.
    """
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "300",  # the double is a thread of this process, and the machine may be busy
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
