"""What models cost on this device: one record per model, runtime, batch size and context, all measured in turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.device.energy import Watch, measure_energy
from llmcompress.evaluation.device.instruments import Unreadable, find_instrument
from llmcompress.evaluation.device.limits import device_name, machine_limits
from llmcompress.evaluation.device.peak_memory import MemoryRequest, peak_memory
from llmcompress.evaluation.device.pinning import Pinning, pinned
from llmcompress.evaluation.device.speed import ClockName, compare_speed, random_prompt
from llmcompress.evaluation.footprint import bytes_on_disk
from llmcompress.loading.config import read_config
from llmcompress.loading.source import find_source
from llmcompress.records.cost import Cost, Energy, MachineLimits, Memory, RateRatio, Speed, Traffic
from llmcompress.records.rows import Which
from llmcompress.runners.base import RUNNERS, Runner
from llmcompress.runners.torch_runner import TorchRunner
from llmcompress.runners.work import Work

Skipped = Literal["memory", "energy", "limits"]


@dataclass(frozen=True, kw_only=True)
class CostSettings:
    """What is measured; every batch size with every context."""

    batches: Sequence[int] = (1,)
    contexts: Sequence[int] = (128,)
    new_tokens: int = 32
    repeats: int = 5
    threads: int | None = None
    """Of torch; None: as many as it has."""
    skip: Collection[Skipped] = ()
    """Peak memory starts a process for every model, energy takes seconds per row where a counter can be read, limits
    take seconds once."""
    clock: ClockName = "wall"

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """Batch sizes and contexts, small ones first."""
        return tuple(product(sorted(set(self.batches)), sorted(set(self.contexts))))


@dataclass(frozen=True)
class Candidate:
    """A model to be measured, and in which runtime."""

    model: str | PreTrainedModel
    """A Hub id, a folder, `builtin:...`; or a live one, which is measured where and as it is."""
    runtime: str = "torch"
    of: Which = "model"
    """What the record says it is; reports compare with what is `dense`."""


def as_candidates(models: Sequence[tuple[str, str | PreTrainedModel]], runtimes: Sequence[str]) -> dict[str, Candidate]:
    """By the names of the table: a model that is measured in several runtimes is called by both.

    Raises: CompressError unless there is one runtime for all or one for each.
    """
    if len(runtimes) not in (1, len(models)):
        raise CompressError(
            "speed.runners",
            f"{len(models)} models, but {len(runtimes)} runners",
            fix="name one runner for all models, or one for each in their order",
            exit_code=ExitCode.USAGE,
        )
    given = list(runtimes) * len(models) if len(runtimes) == 1 else list(runtimes)
    pairs = dict.fromkeys((name, runtime) for (name, _), runtime in zip(models, given, strict=True))
    often = {name for name, count in Counter(name for name, _ in pairs).items() if count > 1}
    live = dict(models)
    return {f"{name} ({runtime})" if name in often else name: Candidate(live[name], runtime) for name, runtime in pairs}


def several(value: int | Sequence[int]) -> Sequence[int]:
    """One number is a list of one."""
    return [value] if isinstance(value, int) else value


@dataclass(frozen=True)
class CostTable:
    """All rows, model by model within one setting, and what they are measured against."""

    rows: tuple[Cost, ...]
    limits: tuple[MachineLimits, ...] = field(default=())

    def ratios(self, reference: str) -> list[tuple[Cost, RateRatio, RateRatio]]:
        """Of every other model's rows: how many times as fast as the reference in prefill and decode, turn by turn."""
        base = {row.setting: row.speed for row in self.rows if row.model == reference}
        return [
            (row, row.speed.prefill.ratio(base[row.setting].prefill), row.speed.decode.ratio(base[row.setting].decode))
            for row in self.rows
            if row.model != reference
        ]


def measure_costs(
    candidates: Mapping[str, Candidate],
    *,
    device: torch.device,
    dtype: str = "auto",
    settings: CostSettings | None = None,
    prompts: Mapping[tuple[int, int], Tensor] | None = None,
) -> CostTable:
    """Peak memory in a fresh process each; then speed, all models in turns; then energy, one after the other.

    `dtype` "auto": float32 on a CPU, where bfloat16 is mostly slower, and the checkpoint's own elsewhere. `prompts`
    gives token ids B×T by batch size and context, for models that decide by their input what to compute.

    Raises: CompressError when a model cannot be loaded, or a context is longer than it can be.
    """
    chosen = settings or CostSettings()
    with ExitStack() as stack:
        pinning = stack.enter_context(pinned(chosen.threads))
        dtypes = {name: _dtype(each, device, dtype) for name, each in candidates.items()}
        memory = {
            name: _memory(each, device, dtypes[name], pinning, chosen) for name, each in candidates.items()
        }  # before any model is in this process, whose memory they share
        runners = {name: stack.enter_context(_open(each, device, dtypes[name])) for name, each in candidates.items()}
        for name, runner in runners.items():
            _refuse_long(name, runner, chosen)
        bench = _Bench(candidates, runners, memory, pinning, chosen)
        rows = [row for setting in chosen.rows for row in bench.measure(setting, (prompts or {}).get(setting))]
        return CostTable(tuple(rows), tuple(dict.fromkeys(bench.limits.values())))


@dataclass(frozen=True)
class _Bench:
    candidates: Mapping[str, Candidate]
    runners: Mapping[str, Runner]
    memory: Mapping[str, Mapping[tuple[int, int], Memory]]
    pinning: Pinning
    settings: CostSettings
    limits: dict[str, MachineLimits] = field(default_factory=dict)
    """By model, as far as measured."""

    def measure(self, setting: tuple[int, int], prompt_BT: Tensor | None) -> Iterator[Cost]:
        """One row per model."""
        batch, context = setting
        prompts = {
            name: random_prompt(runner.vocabulary, batch=batch, tokens=context) if prompt_BT is None else prompt_BT
            for name, runner in self.runners.items()
        }
        speeds = compare_speed(
            self.runners,
            prompts,
            new_tokens=self.settings.new_tokens,
            repeats=self.settings.repeats,
            clock=self.settings.clock,
        )
        for name, runner in self.runners.items():
            computed = runner.logits(prompts[name][:1, :1]).dtype
            if "limits" not in self.settings.skip:
                self.limits[name] = machine_limits(runner.device, computed, self.pinning.threads, self.settings.clock)
            yield Cost(
                of=self.candidates[name].of,
                model=name,
                runtime=self.candidates[name].runtime,
                device=device_name(runner.device),
                dtype=str(computed).removeprefix("torch."),
                threads=self.pinning.threads,
                cores=self.pinning.cores,
                batch=batch,
                context=context,
                new_tokens=self.settings.new_tokens,
                bytes_on_disk=_on_disk(self.candidates[name]),
                speed=speeds[name],
                memory=self.memory[name][setting],
                traffic=_traffic(runner.work(prompts[name]), prompts[name], speeds[name], self.limits.get(name)),
                energy=self._energy(runner, prompts[name]),
            )

    def _energy(self, runner: Runner, prompt_BT: Tensor) -> Energy:
        if "energy" in self.settings.skip:
            return Energy(instrument=None, unavailable=NOT_ASKED)
        try:
            instrument = find_instrument(runner.device)
        except Unreadable as problem:
            return Energy(instrument=None, unavailable=str(problem))
        return measure_energy(Watch(instrument), runner, prompt_BT, new_tokens=self.settings.new_tokens)


NOT_ASKED = "not asked for"


def _traffic(work: Work | None, prompt_BT: Tensor, speed: Speed, limits: MachineLimits | None) -> Traffic | None:
    if work is None:
        return None
    prefills = speed.prefill.median / prompt_BT.numel()
    steps = speed.decode.median / prompt_BT.shape[0]
    moved = work.weight_bytes + work.cache_bytes
    return Traffic(
        prefill_flops=work.prefill_flops,
        weight_bytes=work.weight_bytes,
        cache_bytes=work.cache_bytes,
        matrix_rate_fraction=prefills * work.prefill_flops / limits.flops_per_second if limits else None,
        bandwidth_fraction=steps * moved / limits.bytes_per_second if limits else None,
    )


def _memory(
    candidate: Candidate, device: torch.device, dtype: torch.dtype, pinning: Pinning, settings: CostSettings
) -> dict[tuple[int, int], Memory]:
    rows = settings.rows
    if "memory" in settings.skip:
        return dict.fromkeys(rows, Memory(instrument=None, unavailable=NOT_ASKED))
    if not isinstance(candidate.model, str):
        reason = "the model is in the memory of this process, together with other things: save it and give its folder"
        return dict.fromkeys(rows, Memory(instrument=None, unavailable=reason))
    request = MemoryRequest(
        model=candidate.model,
        runtime=candidate.runtime,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=pinning.threads,
        settings=rows,
        new_tokens=settings.new_tokens,
    )
    return dict(zip(rows, peak_memory(request), strict=True))


def _open(candidate: Candidate, device: torch.device, dtype: torch.dtype) -> Runner:
    if isinstance(candidate.model, str):
        return RUNNERS[candidate.runtime].open(candidate.model, device=device, dtype=dtype)
    return TorchRunner(candidate.model)


def _dtype(candidate: Candidate, device: torch.device, dtype: str) -> torch.dtype:
    if dtype != "auto":
        found: torch.dtype = getattr(torch, dtype)
        return found
    if device.type == "cpu" or not isinstance(candidate.model, str):
        return torch.float32
    config = read_config(find_source(candidate.model).folder, may_be_quantized=True)[0]
    return getattr(config, "dtype", None) or torch.bfloat16


def _on_disk(candidate: Candidate) -> int | None:
    if not isinstance(candidate.model, str):
        return None
    source = find_source(candidate.model)
    known = bytes_on_disk(source.gguf or source.folder)
    # a format that is no checkpoint: everything in its folder
    return known or sum(file.stat().st_size for file in source.folder.rglob("*") if file.is_file())


def _refuse_long(name: str, runner: Runner, settings: CostSettings) -> None:
    longest = max(settings.contexts) + settings.new_tokens
    if runner.max_positions is not None and longest > runner.max_positions:
        raise CompressError(
            "speed.context",
            f"a context of {max(settings.contexts)} tokens and {settings.new_tokens} new ones are {longest}, but the "
            f"model was made for {runner.max_positions}",
            where=name,
            fix=f"use a context of at most {runner.max_positions - settings.new_tokens}",
            exit_code=ExitCode.USAGE,
        )
