"""An evaluation with something of every kind of measurement, and texts that would break a page that trusts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from llmcompress.records.cost import Cost, Energy, Memory, Rate, Speed
from llmcompress.records.evaluation import Compression, Evaluation
from llmcompress.records.gate import GateLimit, GateResult
from llmcompress.records.inside import Distribution, MovedToken, PositionDivergence, TokenDivergences
from llmcompress.records.measurements import Divergence, Estimate, PerplexityResult, WeightBytes
from llmcompress.records.rows import SiteReport
from llmcompress.records.tasks import (
    GeneratedText,
    GenerationComparison,
    GenerationPair,
    GenerationsResult,
    Interval,
    TaskComparison,
    TaskResult,
    TaskScore,
)

EVIL = '<script>alert("x")</script> & <img src=https://example.org/a.png> | `code` *bold*'
TOKEN = "hf_" + "a" * 30
Of = Literal["dense", "compressed"]


def estimate(mean: float, error: float | None = 0.001) -> Estimate:
    return Estimate(mean=mean, standard_error=error)


def interval(mean: float, half: float = 0.01, count: int = 500) -> Interval:
    return Interval(mean=mean, standard_error=half / 2, low=mean - half, high=mean + half, count=count)


def perplexity(of: Of, value: float) -> PerplexityResult:
    return PerplexityResult(
        of=of, text="wikitext2:test", window=512, bos=True, tokens=7000, perplexity=value, bits_per_byte=0.9
    )


def divergence(**changes: Any) -> Divergence:
    facts: dict[str, Any] = {
        "text": "wikitext2:test",
        "window": 512,
        "bos": True,
        "tokens": 7000,
        "top": 64,
        "top_mass": 0.99,
        "kl": estimate(0.02),
        "kl_median": 0.01,
        "kl_90": 0.05,
        "kl_99": 0.2,
        "loss_increase": estimate(0.0119, 0.002),
        "same_top": estimate(0.96),
        "right_to_wrong": estimate(0.012),
        "wrong_to_right": estimate(0.008),
    }
    return Divergence(**{**facts, **changes})


def task(of: Of, value: float, name: str = "arc_easy") -> TaskResult:
    return TaskResult(
        of=of,
        task=name,
        version="1",
        documents=500,
        limit=500,
        shots=0,
        chat_template=False,
        scores=(TaskScore(metric="acc", value=value, standard_error=0.02, higher_is_better=True),),
        main="acc",
    )


def answers(wrong: float, right: float, name: str = "arc_easy") -> TaskComparison:
    return TaskComparison(
        task=name,
        metric="acc",
        dense=0.541,
        compressed=0.541 + right - wrong,
        change=interval(right - wrong),
        right_to_wrong=interval(wrong),
        wrong_to_right=interval(right),
        margin_change=None,
    )


def cost(of: Of, decode: float) -> Cost:
    turns = tuple(decode * factor for factor in (0.99, 1.0, 1.01))
    rate = Rate.of(turns)
    return Cost(
        of=of,
        model=of,
        runtime="torch",
        device="cpu",
        dtype="float32",
        threads=1,
        cores=None,
        batch=1,
        context=128,
        new_tokens=32,
        bytes_on_disk=None,
        speed=Speed(prefill=rate, decode=rate, seconds_to_first_token=0.4, clock="wall"),
        memory=Memory(instrument="VmHWM", running=900_000_000),
        traffic=None,
        energy=Energy(instrument=None, unavailable="no counter"),
    )


def distribution(of: Of, what: Literal["weights", "activations"] = "weights") -> Distribution:
    counts = tuple(100 - abs(number - 32) for number in range(64))
    return Distribution(
        of=of,
        what=what,
        sites="model.layers.*.mlp.up_proj",
        low=-0.4,
        high=0.4,
        counts=counts,
        outside=3,
        zeros=0.01,
        largest=1.5,
    )


def moved(text: str = "wikitext2:test") -> TokenDivergences:
    return TokenDivergences(
        text=text,
        positions=tuple(PositionDivergence(first=n * 16, last=n * 16 + 15, kl=0.02 + n / 1000) for n in range(32)),
        worst=(
            MovedToken(
                before=f"the quick {EVIL}",
                actual=" fox",
                dense="</blockquote><b>",
                compressed="\x00dog",
                kl=6.1,
                dense_probability=0.9,
                compressed_probability=0.01,
            ),
        ),
    )


def generations(of: Of) -> GenerationsResult:
    return GenerationsResult(
        of=of,
        source="builtin:prompts",
        chat_template=False,
        max_new_tokens=64,
        texts=(GeneratedText(prompt="p", text=EVIL, tokens=3, ended=True),),
        tokens=interval(30.0),
        repetition=interval(0.05),
        distinct_1=0.6,
        distinct_2=0.8,
        followed=None,
    )


def side_by_side() -> GenerationComparison:
    return GenerationComparison(
        source="builtin:prompts",
        rouge_l=interval(0.8),
        same=interval(0.4),
        repetition_change=interval(0.01),
        tokens_change=interval(1.0),
        followed_change=None,
        pairs=(GenerationPair(prompt=f"Say {EVIL}", dense="yes", compressed=EVIL, rouge_l=0.5),),
    )


def compression() -> Compression:
    sites = tuple(
        SiteReport(
            site=f"model.layers.{block}.mlp.{name}_proj",
            algorithm="gptq",
            scheme="int4_g32",
            bits_per_weight=4.5,
            error=0.001 * (block + 1),
            error_before=0.01,
            tokens=100,
            sparsity=0.1 * block,
        )
        for block in range(4)
        for name in ("up", "down")
    )
    recipe = f"model: {Path.home()}/models/dense\nrevision: {TOKEN}\npasses:\n- gptq: {{scheme: int4_g32}}\n"
    return Compression(
        model="dense", recipe=recipe, calibration_tokens=1024, sites=sites, refused={}, warnings=("few samples",)
    )


def evaluation(*more: Any, **changes: Any) -> Evaluation:
    """With measurements in addition, and fields changed."""
    facts: dict[str, Any] = {
        "model": f"out/{EVIL}",
        "baseline": "dense",
        "runner": "torch",
        "versions": {"torch": "2"},
        "machine": {"cpu": "a CPU"},
        "measurements": (
            WeightBytes(of="dense", bytes=360),
            WeightBytes(of="compressed", bytes=100),
            perplexity("dense", 20.0),
            perplexity("compressed", 20.24),
            divergence(),
            task("dense", 0.541),
            task("compressed", 0.534),
            answers(0.014, 0.007),
            cost("dense", 30.0),
            cost("compressed", 30.3),
            moved(),
            distribution("dense"),
            distribution("compressed"),
            distribution("dense", "activations"),
            generations("dense"),
            generations("compressed"),
            side_by_side(),
            GateResult(limits=(GateLimit(name="kl_mean", limit=0.05, found=0.02, on="wikitext2:test", kept=True),)),
            *more,
        ),
        "command": f"llmcompress evaluate {Path.home()}/out --baseline dense",
        "compression": compression(),
    }
    return Evaluation(**{**facts, **changes})
