"""Tokens per second of prefill and decode, measured so that models can be compared: interleaved, warm, medians."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from llmcompress.loading.load import load
from llmcompress.modules.cache_names import cache_argument, cache_of

SEED = 0

Clock = Callable[[], float]


class SpeedResult(BaseModel):
    """One text at a time (batch 1), greedy, with a key-value cache."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    """`cpu`, or the name of the accelerator."""
    threads: int
    """CPU threads of torch."""
    dtype: str
    """Of the model's parameters."""
    prompt_tokens: int
    new_tokens: int
    repeats: int
    prefill_tokens_per_second: float
    """Median over the repeats."""
    prefill_spread: float
    """(Fastest - slowest repeat) ÷ median."""
    decode_tokens_per_second: float
    decode_spread: float
    seconds_to_first_token: float
    """Median, from the prompt to the first new token."""
    prefill_rates: tuple[float, ...]
    """Tokens per second of every repeat, in order: what was measured in one turn compares best."""
    decode_rates: tuple[float, ...]


class SpeedRatio(BaseModel):
    """How many times as fast as another model, turn by turn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    median: float
    lowest: float
    highest: float


def speed_ratios(model: SpeedResult, against: SpeedResult) -> dict[str, SpeedRatio]:
    """Of `prefill` and `decode`; both models were measured in turns."""
    pairs = {
        "prefill": zip(model.prefill_rates, against.prefill_rates, strict=True),
        "decode": zip(model.decode_rates, against.decode_rates, strict=True),
    }
    return {name: _ratio([ours / other for ours, other in rates]) for name, rates in pairs.items()}


def _ratio(of_turns: Sequence[float]) -> SpeedRatio:
    return SpeedRatio(median=statistics.median(of_turns), lowest=min(of_turns), highest=max(of_turns))


def speed_of(
    models: Mapping[str, str | nn.Module],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = "auto",
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
) -> dict[str, SpeedResult]:
    """Load the models (Hub ids, folders, `builtin:...`) and measure them in turns, live ones where and as they are.

    `dtype` "auto": float32 on a CPU, where bfloat16 is mostly slower, and the checkpoint's own elsewhere.

    Raises: CompressError when one cannot be loaded.
    """
    where = torch.device(device)
    chosen: torch.dtype | str = torch.float32 if dtype == "auto" and where.type == "cpu" else dtype
    loaded: dict[str, nn.Module] = {
        name: load(model, dtype=chosen, device=where).model if isinstance(model, str) else model
        for name, model in models.items()
    }
    return compare_speed(loaded, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats)


def measure_speed(model: nn.Module, *, prompt_tokens: int = 128, new_tokens: int = 32, repeats: int = 5) -> SpeedResult:
    """The speed of one model on its device."""
    return compare_speed({"model": model}, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats)["model"]


def compare_speed(
    models: Mapping[str, nn.Module],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    prompt_1T: Tensor | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, SpeedResult]:
    """Several models in turns, so that what else happens on the machine happens to all of them alike.

    The prompt is random token ids, since only their number matters; a model that decides by its input what to compute
    needs a real one, `prompt_1T`. The first turn of each model warms it up and is not counted. `clock` may count
    processor time in the place of wall time, on a machine that is not free.
    """
    assert new_tokens > 1 and repeats > 0
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    modes = {name: model.training for name, model in models.items()}
    prompts = {
        name: _prompt(model, prompt_tokens) if prompt_1T is None else prompt_1T for name, model in models.items()
    }
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a run would be counted as the model's time
    try:
        for turn in range(repeats + 1):
            for name, model in models.items():
                took = _once(model.eval(), prompts[name], new_tokens, clock)
                if turn:
                    seconds[name].append(took)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
        for name, model in models.items():
            model.train(modes[name])
    return {name: _result(models[name], seconds[name], prompts[name].shape[1], new_tokens) for name in models}


@torch.inference_mode()
def _once(model: nn.Module, prompt_1T: Tensor, new_tokens: int, clock: Clock) -> tuple[float, float]:
    """Seconds until the first new token, and for the ones after it."""
    device = _device(model)
    ids, argument = prompt_1T.to(device), cache_argument(model.forward)  # asked for outside of what is timed
    start = _now(device, clock)
    out: Any = model(input_ids=ids, use_cache=True)
    ids = out.logits[:, -1:].argmax(-1)
    first = _now(device, clock)
    for _ in range(new_tokens - 1):
        cache = {argument: cache_of(out)} if argument else {}
        out = model(input_ids=ids, **cache, use_cache=True)
        ids = out.logits[:, -1:].argmax(-1)
    return first - start, _now(device, clock) - first


def _prompt(model: nn.Module, tokens: int) -> Tensor:
    config: Any = model.config
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(config.get_text_config().vocab_size, (1, tokens), generator=generator)


def _now(device: torch.device, clock: Clock) -> float:
    """The time when all pending work of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return clock()


def _result(
    model: nn.Module, seconds: Sequence[tuple[float, float]], prompt_tokens: int, new_tokens: int
) -> SpeedResult:
    prefill_rates = tuple(prompt_tokens / first for first, _ in seconds)
    decode_rates = tuple((new_tokens - 1) / rest for _, rest in seconds)
    prefill, prefill_spread = _median(prefill_rates)
    decode, decode_spread = _median(decode_rates)
    device = _device(model)
    return SpeedResult(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=len(seconds),
        prefill_tokens_per_second=prefill,
        prefill_spread=prefill_spread,
        decode_tokens_per_second=decode,
        decode_spread=decode_spread,
        seconds_to_first_token=statistics.median(first for first, _ in seconds),
        prefill_rates=prefill_rates,
        decode_rates=decode_rates,
    )


def _median(rates: Sequence[float]) -> tuple[float, float]:
    middle = statistics.median(rates)
    return middle, (max(rates) - min(rates)) / middle


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
