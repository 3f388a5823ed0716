"""One measured trial: passes on a freshly loaded model, perplexity and size afterwards. Every eval program uses it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.evaluation.footprint import parameters
from llmcompress.evaluation.perplexity import perplexity
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe
from llmcompress.records.measurements import PerplexityResult
from llmcompress.records.rows import SiteReport


@dataclass(frozen=True)
class Setting:
    """What all trials of one program share. Calibration and evaluation text must be different files."""

    model: str
    calibration: str | Path
    text: str | Path
    samples: int = 64
    tokens: int = 256
    window: int = 512
    max_windows: int = 60

    @property
    def task(self) -> PerplexityTask:
        """Non-overlapping windows, each with BOS."""
        return PerplexityTask(source=str(self.text), window=self.window, bos="always", max_windows=self.max_windows)


@dataclass(frozen=True)
class Trial:
    """What came out."""

    perplexity: PerplexityResult
    parameters: int
    rows: list[SiteReport]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def run_trial(setting: Setting, passes: str = "", *, seed: int = 0, device: str = "cpu") -> Trial:
    """Apply passes (the YAML list below `passes:`; none: the dense model) and measure."""
    where = torch.device(device)
    loaded = load_for_compression(find_source(setting.model), dtype=torch.float32)
    model, rows = loaded.model, list[SiteReport]()
    if passes:
        recipe = parse_recipe("passes:\n" + passes, "evals")
        settings = Calibration(source=str(setting.calibration), samples=setting.samples, tokens=setting.tokens)
        data = calibration_windows(
            settings, loaded.tokenizer, max_positions=setting.window, seed=seed, progress=Silent()
        )
        model, rows = apply_passes(
            model,
            map_model(model),
            recipe.passes,
            RunContext(data.windows_NT, batch=8, device=where, storage_dtype=loaded.preflight.storage_dtype, seed=seed),
        )
    result = perplexity(model, loaded.tokenizer, setting.task, device=where, progress=Silent())
    return Trial(result, parameters(model), rows, model, loaded.tokenizer)
