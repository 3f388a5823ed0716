"""Measures the rows of real_rows.yaml on the real model: our passes and the peers' tools, on texts none of them saw.

    python evals/real_trials.py --calibration wikitext-2/valid.txt --text WikiText-2=wikitext-2/test.txt \\
        --text books=books/test.txt --validation books-valid=books/valid.txt --environments FOLDER

All tools get the same token ids. Peers work in environments of their own (`peers/venvs.py`) and hand over dense
weights, which are measured like ours, in float32. Every trial is written to evals/results/real-NAME.json as soon as it
is done, with the losses of every window, and is not done again: a program that was stopped goes on. Trials of another
protocol (other texts, windows, model) are refused, not mixed: give them a name like MODEL--128-samples. Set
OMP_NUM_THREADS=1: seconds are CPU seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import torch
import yaml
from pydantic import BaseModel, ConfigDict
from real_model import real_model
from safetensors.torch import load_file, save_file
from study import (
    Bench,
    Study,
    Trial,
    calibration_draw,
    rounded_bytes,
    stored_bytes,
    study_options,
    tokens_per_window,
    unused_text,
)

import llmcompress
from llmcompress.evaluation.environment import machine, versions
from llmcompress.modules.scheme import named_scheme
from llmcompress.storage.paths import cache_folder

HERE = Path(__file__).resolve().parent
UNUSED = "the rest of the calibration file"
GROUP = 64
"""Inputs that share a scale, in the rows of peers."""


class Row(BaseModel):
    """One line of real_rows.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    settings: tuple[str, ...]
    who: str = "ours"
    """Or the name of a peer's environment."""
    passes: tuple[dict[str, dict[str, Any]], ...] = ()
    mixed_precision: Literal["bf16"] | None = None
    """What our blocks multiply in while calibration data run through them."""
    draws: int = 1
    candidate: bool = False
    """Whether draw 0 is measured on the validation texts, on which methods are chosen."""
    script: str = ""
    peer: str = ""
    """What the peer's script calls the method."""
    blocks: str = ""
    """Numbers of the blocks that the peer quantizes; all where there are none."""
    average: float | None = None
    """Bits per weight that the peer's choice of bits is to come to."""
    allocation: str = ""
    """Method of AutoRound's row with the same setting, whose bits our pass takes as overrides."""


class Job(NamedTuple):
    """One trial that may have to be made."""

    row: Row
    setting: str
    draw: int

    @property
    def key(self) -> dict[str, Any]:
        """What it is called in the result file."""
        return {"setting": self.setting, "who": self.row.who, "method": self.row.method, "draw": self.draw}

    @property
    def scheme(self) -> str:
        """The setting without what follows a comma."""
        return self.setting.partition(",")[0]


@click.command()
@study_options(chosen="methods are", only="who, method, setting, draw, or several: ours/gptq/int3_g64/draw 0")
@click.option("--rows", type=Path, default=HERE / "real_rows.yaml", show_default=True)
@click.option("--environments", type=Path, help="where peers' environments are kept; without it peers are left out")
@click.option("--handed", type=Path, help="keeps what peers hand over; what is there is measured and not made again")
@click.option("--minutes", type=float, help="begin no further trial after so many")
@click.option("--called", default="WikiText-2 valid", show_default=True, help="the calibration text, in tables")
@click.option("--samples", default=Study.samples, show_default=True, help="calibration windows of 512 tokens")
def main(
    model: Path | None,
    name: str,
    calibration: Path,
    texts: Sequence[str],
    validation: Sequence[str],
    rows: Path,
    only: Sequence[str],
    environments: Path | None,
    handed: Path | None,
    minutes: float | None,
    called: str,
    samples: int,
) -> None:
    """Do what is missing."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        cache = cache_folder() / "evals"
        asked = Study(model or real_model(), calibration, named(texts), named(validation), cache, samples=samples)
        study = with_unused(asked, Path(scratch))
        path, of_model = HERE / "results" / f"real-{name}.json", name.partition("--")[0]
        results = Results(path, study, model=of_model, calibration=called)
        bench = Bench(study)
        for job in missing(read_rows(rows), results.trials, only, peers=environments is not None):
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                break
            trial = ours(bench, job, handed) if job.row.who == "ours" else theirs(bench, job, environments, handed)
            results.add(bench, {**job.key, "candidate": job.row.candidate, **trial})
            click.echo(f"{job.setting:24s} {job.row.who:15s} {job.row.method:18s} {job.draw} {shown(trial)}", err=True)
    click.echo(str(results.path))


def named(pairs: Sequence[str]) -> dict[str, Path]:
    """NAME=FILE as a table."""
    return {name: Path(file) for name, _, file in (pair.partition("=") for pair in pairs)}


def read_rows(path: Path) -> list[Row]:
    """Checked against `Row`."""
    return [Row.model_validate(row) for row in yaml.safe_load(path.read_text(encoding="utf-8"))]


def with_unused(study: Study, to: Path) -> Study:
    """Beside the validation texts, where there are any, what no draw used of the calibration file."""
    if not study.validation:
        return study
    loaded = study.loaded()
    draws = (calibration_draw(study.calibration, loaded, study.samples, study.tokens, draw)[1] for draw in range(3))
    rest = to / "rest.txt"
    rest.write_text(unused_text(study.calibration, frozenset().union(*draws)), encoding="utf-8")
    return replace(study, validation={**study.validation, UNUSED: rest})


def missing(rows: Sequence[Row], done: Sequence[Trial], only: Sequence[str], *, peers: bool) -> Iterator[Job]:
    """Draw 0 of all rows before draw 1 of any."""
    known = [{name: trial[name] for name in ("setting", "who", "method", "draw")} for trial in done]
    for draw in range(max(row.draws for row in rows)):
        for row in rows:
            for setting in row.settings if draw < row.draws and (peers or row.who == "ours") else ():
                words = {setting, row.who, row.method, f"draw {draw}"}
                asked = not only or any(all(part in words for part in each.split("/")) for each in only)
                job = Job(row, setting, draw)
                if asked and job.key not in known:
                    yield job


def names_of(bench: Bench, job: Job) -> list[str]:
    """The texts that a row is measured on. Methods are chosen on draw 0."""
    return [*bench.study.texts, *(bench.study.validation if job.row.candidate and job.draw == 0 else ())]


def ours(bench: Bench, job: Job, handed: Path | None) -> Trial:
    """Our passes, and what comes out measured."""
    filled = json.loads(json.dumps(job.row.passes).replace("{scheme}", job.scheme))
    given: dict[str, Any] = {}
    if job.row.allocation:
        assert handed is not None, "an allocation is read from what its peer handed over: give --handed"
        told = json.loads((handed / f"{label(job, 'auto-round', job.row.allocation)}.json").read_text())
        given = {name: {"scheme": f"int{bits}_g{GROUP}"} for name, bits in told["bits"].items()}
    compressing = [{name: {**options, "overrides": given}} for each in filled for name, options in each.items()]
    asked = compressing if given else filled
    model, trial = bench.compress(asked, job.draw, mixed_precision=job.row.mixed_precision)
    texts = bench.measure(model, names_of(bench, job))
    return {**trial, "bytes": stored_bytes(model), "passes": filled, "texts": texts}


def label(job: Job, who: str, method: str) -> str:
    """Of the files that a peer hands over."""
    return "-".join((job.setting, who, method, str(job.draw))).replace(" ", "_").replace(",", "")


def theirs(bench: Bench, job: Job, environments: Path | None, handed: Path | None) -> Trial:
    """The peer's tool in its environment, and what it hands over measured; a reason where it fails."""
    assert environments is not None
    sys.path.append(str(HERE / "peers"))
    from venvs import run_in

    with tempfile.TemporaryDirectory() as scratch:
        out = (handed or Path(scratch)) / f"{label(job, job.row.who, job.row.method)}.safetensors"
        told = out.with_suffix(".json")
        if not told.exists():
            windows = Path(scratch) / "windows.safetensors"
            save_file({"windows": bench.study.calibration_windows(job.draw).contiguous()}, windows)
            arguments = [str(bench.study.model), *options(job), "--windows", str(windows), "--out", str(out)]
            told.write_text(json.dumps(run_in(job.row.who, job.row.script, arguments, folder=environments)))
        found, state = json.loads(told.read_text()), load_file(out)
    model = bench.study.loaded().model
    dense = {name: tensor.clone() for name, tensor in model.named_parameters()}
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    assert not unexpected, unexpected
    bits = {f"{name}.weight": each for name, each in found.get("bits", {}).items()}
    return {
        "cpu_seconds": round(found["cpu_seconds"], 1),
        "peak_bytes": None,
        "bytes": rounded_bytes(dense, state, bits=bits or named_scheme(job.scheme).weights.bits, group=GROUP),
        "parameters": sum(tensor.numel() for tensor in dense.values()),
        "versions": found["versions"],
        "texts": bench.measure(model, names_of(bench, job)),
    }


def options(job: Job) -> list[str]:
    """What the peer's script is told."""
    told = ["--method", job.row.peer, "--group", str(GROUP)]
    if job.row.average is not None:
        return [*told, "--average", str(job.row.average)]
    grid = named_scheme(job.scheme).weights
    assert grid.symmetric and grid.group == GROUP
    return [*told, "--bits", str(grid.bits), *(["--blocks", job.row.blocks] if job.row.blocks else [])]


class Results:
    """The result file: trials and the protocol that they share."""

    def __init__(self, path: Path, study: Study, **facts: str) -> None:
        """Raises: click.UsageError when the file holds trials of another protocol."""
        self.path, self._facts = path, {**facts, "protocol": study.protocol(), "tokens": {}}
        self.trials: list[Trial] = []
        self._read()

    def _read(self) -> None:
        """What is there by now."""
        if self.path.exists():
            known = json.loads(self.path.read_text(encoding="utf-8"))
            ours = json.loads(json.dumps(self._facts["protocol"]))
            if known["protocol"] != ours:
                different = [name for name in ours if known["protocol"].get(name) != ours[name]]
                raise click.UsageError(
                    f"{self.path.name} was measured with another {', '.join(different)}: use another --name"
                )
            self.trials, self._facts["tokens"] = known["trials"], known["tokens"]

    def add(self, bench: Bench, trial: Trial) -> None:
        """Write it, one line a trial, beside what another process may have measured meanwhile."""
        self._read()
        self.trials.append({**trial, "commit": commit()})
        tokens: dict[str, list[int]] = self._facts["tokens"]
        tokens.update({name: tokens_per_window(each.text) for name, each in bench.dense.items()})
        about = {
            "model": self.path.stem.removeprefix("real-"),
            **self._facts,
            "versions": versions(),
            "machine": machine(),
        }
        head = json.dumps(about, indent=1, ensure_ascii=False).removesuffix("\n}")
        lines = ",\n".join("  " + json.dumps(each, ensure_ascii=False) for each in self.trials)
        scratch = self.path.with_suffix(".part")
        scratch.write_text(f'{head},\n "trials": [\n{lines}\n ]\n}}\n', encoding="utf-8")
        scratch.replace(self.path)


def commit() -> str:
    """The last one that changed the package which is imported; `+`: it was changed since."""
    package = Path(llmcompress.__file__).parent
    git, only = ["git", "-C", str(package)], ["--", str(package)]
    name = subprocess.run([*git, "log", "-1", "--format=%h", *only], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain", *only], capture_output=True, text=True, check=False)
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


def shown(trial: Trial) -> str:
    """For people who wait: mean loss of every text."""
    sums = {name: sum(each["nats"]) for name, each in trial["texts"].items()}
    return f"{trial['cpu_seconds']:.0f} s, nats " + ", ".join(f"{name} {total:.1f}" for name, total in sums.items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
