"""One model measured in many trials: every trial gives the losses of every window, so any two can be compared in pairs.

N = windows, T = tokens of one, P = predicted tokens of one, K = likely tokens that KL looks at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import click
import torch
import yaml
from real_model import NAME
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.calibration.sources import paragraph_hashes
from llmcompress.calibration.tokens import max_positions
from llmcompress.evaluation.divergence import divergences
from llmcompress.evaluation.environment import versions
from llmcompress.evaluation.footprint import ideal_bytes, parameters
from llmcompress.evaluation.measuring import observe
from llmcompress.evaluation.metrics.perplexity import PerplexityMetric
from llmcompress.evaluation.scores import WindowScores, score
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.evaluation.texts import EvaluationText, evaluation_text
from llmcompress.loading.load import Loaded, load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.loading.teachers import TeacherFiles
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe
from llmcompress.runners.torch_runner import TorchRunner
from llmcompress.storage.cache import TensorCache
from llmcompress.storage.disk import sha256

Trial = dict[str, Any]
"""As it is written to a result file: `texts`: name → per window `nats` and `kl`; bytes, seconds, peak memory."""


def study_options(*, chosen: str, only: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of a program that runs a study; what is `chosen` on validation text, and what `--only` names."""
    options = (
        click.option("--model", type=Path, help="folder; default: the one that real_model.py makes"),
        click.option("--name", default=NAME, show_default=True, help="of the result file"),
        click.option("--calibration", type=Path, required=True, help="file"),
        click.option("--text", "texts", multiple=True, required=True, help="NAME=FILE, reported"),
        click.option("--validation", multiple=True, help=f"NAME=FILE, {chosen} chosen on it"),
        click.option("--only", multiple=True, help=only),
    )

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return with_options


@dataclass(frozen=True)
class Study:
    """What all trials share. Texts are files; calibration and measured text must differ."""

    model: Path
    calibration: Path
    texts: Mapping[str, Path]
    """Name → file: results are reported on these."""
    validation: Mapping[str, Path]
    """Name → file: methods are chosen on these, and only rows that are candidates are measured there."""
    cache: Path
    samples: int = 16
    tokens: int = 512
    window: int = 512
    windows: int = 10
    """Of every reported text."""
    validation_windows: int = 5

    def protocol(self) -> dict[str, Any]:
        """Everything that two trials must share to be compared: hashes, not paths."""
        files = {"calibration": self.calibration, **self.texts, **self.validation}
        return {
            "model_sha256": sha256(self.model / "model.safetensors"),
            "text_sha256": {name: sha256(path) for name, path in files.items()},
            "texts": list(self.texts),
            "validation": list(self.validation),
            "samples": self.samples,
            "tokens": self.tokens,
            "window": self.window,
            "bos": True,
            "windows": self.windows,
            "validation_windows": self.validation_windows,
        }

    def calibration_windows(self, draw: int) -> Tensor:
        """N×T token ids."""
        return calibration_draw(self.calibration, self.loaded(), self.samples, self.tokens, draw)[0]

    def loaded(self) -> Loaded:
        """A fresh copy of the dense model, float32."""
        return load_for_compression(find_source(str(self.model)), dtype=torch.float32)


def calibration_draw(path: Path, loaded: Loaded, samples: int, tokens: int, draw: int) -> tuple[Tensor, frozenset[int]]:
    """Windows of one calibration draw, and the hashes of the paragraphs they are made of."""
    settings = Calibration(source=str(path), samples=samples, tokens=tokens)
    data = calibration_windows(settings, loaded.tokenizer, max_positions=tokens, seed=draw, progress=Silent())
    return data.windows_NT, data.paragraphs


def unused_text(path: Path, used: frozenset[int]) -> str:
    """The paragraphs of a file that no calibration draw saw; those too short to be told apart are left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return "\n".join(line for line in lines if (known := paragraph_hashes([line])) and not known & used)


@dataclass(frozen=True)
class DenseScores:
    """What the dense model says of a text."""

    text: EvaluationText
    windows: Sequence[WindowScores]


@dataclass
class Bench:
    """A study with what is computed once: the model's map, the texts' tokens, the dense model's scores."""

    study: Study
    dense: dict[str, DenseScores] = field(default_factory=dict)
    map: ModelMap | None = None

    def text(self, name: str) -> DenseScores:
        """The dense model's scores of one text, from the cache where they are there."""
        if name not in self.dense:
            study, reported = self.study, name in self.study.texts
            loaded = study.loaded()
            task = PerplexityTask(
                source=str((study.texts if reported else study.validation)[name]),
                window=study.window,
                bos="always",
                max_windows=study.windows if reported else study.validation_windows,
            )
            text = evaluation_text(task, loaded.tokenizer, max_positions(loaded.model.config))
            identity = {"weights": sha256(study.model / "model.safetensors"), "torch": versions()["torch"]}
            cache = TensorCache(study.cache)
            runner: Callable[[], TorchRunner] = lambda: TorchRunner(loaded.model)  # noqa: E731
            metric = PerplexityMetric(text, task.top, loaded.tokenizer)
            (seen,) = observe([metric], runner, model=identity, cache=cache, progress=Silent())
            self.dense[name] = DenseScores(text, metric.windows(seen.found))
        return self.dense[name]

    def compress(
        self,
        passes: Sequence[Any],
        draw: int,
        teachers: TeacherFiles | None = None,
        mixed_precision: Literal["bf16"] | None = None,
    ) -> tuple[PreTrainedModel, Trial]:
        """Our passes on a fresh model (none: the dense one); what they took."""
        study = self.study
        windows_NT = study.calibration_windows(draw)
        loaded = study.loaded()
        self.map = self.map or map_model(loaded.model)
        chosen = parse_recipe(yaml.safe_dump({"passes": list(passes)}), "evals").passes if passes else ()
        context = RunContext(
            windows_NT,
            batch=8,
            storage_dtype=loaded.preflight.storage_dtype,
            seed=draw,
            mixed_precision=mixed_precision,
        )
        context = context if teachers is None else replace(context, teachers=teachers)
        forget_peak()
        before, began = resident_bytes("VmRSS"), time.process_time()
        model, _ = apply_passes(loaded.model, self.map, chosen, context)
        taken = time.process_time() - began
        peak = resident_bytes("VmHWM")
        return model, {
            "cpu_seconds": round(taken, 1),
            "peak_bytes": peak,
            "bytes_before": before,
            "parameters": parameters(model),
        }

    def measure(self, model: PreTrainedModel, names: Sequence[str]) -> dict[str, dict[str, list[float]]]:
        """Text → per window: sum of losses and of KL to the dense model in nats."""
        return {name: losses(model, self.text(name)) for name in names}


def losses(model: PreTrainedModel, dense: DenseScores) -> dict[str, list[float]]:
    """Of every window: `nats`, the sum of losses, and `kl`, the sum of KL(dense ‖ model)."""
    with TorchRunner(model) as runner:
        scored = list(score(runner, dense.text.windows, reference=dense.windows, name=dense.text.name))
    return per_window(scored, dense.windows)


def per_window(scored: Sequence[WindowScores], dense: Sequence[WindowScores]) -> dict[str, list[float]]:
    """Sums over the predicted tokens of each window; 1e-4 nats are far below a window's noise."""
    nats = [-float(each.logprob_P.sum(dtype=torch.float64)) for each in scored]
    pairs = zip(dense, scored, strict=True)
    kl = [float(divergences(before.logprobs_PK, after.logprobs_PK).sum()) for before, after in pairs]
    return {"nats": [round(each, 4) for each in nats], "kl": [round(each, 4) for each in kl]}


def tokens_per_window(text: EvaluationText) -> list[int]:
    """Predicted tokens."""
    return [len(window) - 1 for window in text.windows]


def stored_bytes(model: PreTrainedModel) -> int:
    """What the weights take: codes without padding, scales and all else in 16 bits. Zeros count in full.

    The model is rounded to 16 bits for it, for good: measure first.
    """
    return ideal_bytes(model.to(torch.bfloat16))


def rounded_bytes(
    dense: Mapping[str, Tensor], found: Mapping[str, Tensor], *, bits: int | Mapping[str, int], group: int
) -> int:
    """The same of dense weights that symmetric codes stand for: those that differ from the dense model are codes."""
    total = 0
    for name, tensor in dense.items():
        coded = name in found and not torch.equal(tensor, found[name].to(tensor.dtype))
        own = bits if isinstance(bits, int) else bits.get(name, 16)
        total += tensor.numel() * own // 8 + tensor.numel() // group * 2 if coded else tensor.numel() * 2
    return total


def forget_peak() -> None:
    """From here on the peak of resident memory counts anew; nothing where the system cannot do that."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def resident_bytes(which: str) -> int | None:
    """`VmRSS`: now, `VmHWM`: at most; None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = (line.split() for line in status.read_text().splitlines())
    return next((1024 * int(line[1]) for line in lines if line and line[0] == f"{which}:"), None)
