"""Whether smaller is faster: tokens per second of pruned and factored shapes against dense, on random weights.

    python evals/speed.py --name cpu-m110
    python evals/speed.py --name cpu-m1100 --shape m1100 --only depth --only "slicegpt, global" --only "low rank"

The weights are random: their number and layout decide the speed, and nothing here says a word about quality. What a
plain config can say is built directly from the config that its pass yields; the rest, and depth for comparison, goes
through the real pass. Every one is measured in turns with dense, in one process, on one thread. Writes
evals/results/speed-NAME.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.evaluation.device.speed import ClockName, compare_speed, random_prompt
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.footprint import parameters
from llmcompress.model.probe import map_model
from llmcompress.model.skeleton import find_blocks
from llmcompress.modules.low_rank import LowRankLinear
from llmcompress.passes.apply import apply_passes
from llmcompress.recipe import parse_recipe
from llmcompress.records.cost import Speed
from llmcompress.runners.torch_runner import TorchRunner

SHAPES: dict[str, dict[str, Any]] = {
    "m110": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 64,
    },
    "m500": {
        "num_hidden_layers": 24,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "m1100": {
        "num_hidden_layers": 22,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
}
"""The 110 M shape, a deep one with grouped queries and that of TinyLlama; all with 32,000 tokens and a tied head."""

BY_PASS = {
    "slicegpt, shortcuts": "slicegpt: {form: shortcuts, fraction: 0.25}",
    "modegpt": "modegpt: {fraction: 0.32}",
    "tensor train": "tensor_train: {fraction: 0.32}",
    "tucker": "tucker: {fraction: 0.5}",
    "int8 codes and a branch": "caldera: {scheme: int8_channel, rank: 64, iterations: 1}",
}
"""What no plain config can say; ratios that leave about three quarters of all parameters, where a method can."""

FEWER = 0.25
"""Share of all parameters that every structured method has to remove."""

CLOCKS: dict[str, ClockName] = {"cpu": "processor", "wall": "wall"}


def llama(**sizes: Any) -> PreTrainedModel:
    """A random model of these sizes; of Mistral's class, which is Llama's with any number of heads."""
    torch.manual_seed(0)
    common = {"vocab_size": 32000, "tie_word_embeddings": True, "sliding_window": None}
    return MistralForCausalLM(MistralConfig(**common, **sizes)).eval().requires_grad_(False)


def variants(sizes: dict[str, Any], dense: PreTrainedModel) -> dict[str, Callable[[], PreTrainedModel]]:
    """What each method makes of a dense model, with 25 % fewer parameters wherever that is what it does."""
    goal = (1 - FEWER) * parameters(dense)
    layers = sizes["num_hidden_layers"]
    left = max(n for n in range(1, layers) if closed_form({**sizes, "num_hidden_layers": n}) <= goal)
    slices = [{**sizes, "hidden_size": d} for d in range(8, sizes["hidden_size"], 8)]
    return {
        "dense again": lambda: dense,
        "depth": lambda: llama(**{**sizes, "num_hidden_layers": left}),
        "depth, by the pass": lambda: through_passes(sizes, f"depth: {{count: {layers - left}}}"),
        "width, FFN and heads": lambda: _nearest(goal, _narrower(sizes)),
        "slicegpt, global": lambda: _nearest(goal, slices),
        "low rank": lambda: _low_rank(llama(**sizes), goal),
        **{name: partial(through_passes, sizes, passes) for name, passes in BY_PASS.items()},
        "unstructured 50 %": lambda: _with_zeros(llama(**sizes), lambda weight: torch.rand_like(weight) < 0.5),
        "2:4": lambda: _with_zeros(llama(**sizes), _two_of_four),
    }


def _narrower(sizes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same share of whole KV groups and of feed-forward channels."""
    groups = sizes["num_key_value_heads"]
    per_group = sizes["num_attention_heads"] // groups
    for kept in range(1, groups + 1):
        for channels in range(128, sizes["intermediate_size"], 64):
            if abs(channels / sizes["intermediate_size"] - kept / groups) < 0.5 / groups + 0.02:
                yield {
                    **sizes,
                    "num_key_value_heads": kept,
                    "num_attention_heads": kept * per_group,
                    "intermediate_size": channels,
                }


def _nearest(goal: float, choices: Iterable[dict[str, Any]]) -> PreTrainedModel:
    """The choice with the most parameters that does not exceed the goal."""
    return llama(**max((sizes for sizes in choices if closed_form(sizes) <= goal), key=closed_form))


def closed_form(sizes: dict[str, Any]) -> int:
    """Parameters of a model of these sizes."""
    hidden, head = sizes["hidden_size"], sizes["head_dim"]
    attention = 2 * hidden * head * (sizes["num_attention_heads"] + sizes["num_key_value_heads"])
    block = attention + 3 * hidden * sizes["intermediate_size"] + 2 * hidden
    return 32000 * hidden + sizes["num_hidden_layers"] * block + hidden


def _low_rank(model: PreTrainedModel, goal: float) -> PreTrainedModel:
    """Every linear of the blocks as two, all of the same share of their parameters."""
    inside = [part for _, block in find_blocks(model) for part in block.modules() if isinstance(part, nn.Linear)]
    weights = sum(part.weight.numel() for part in inside)
    share = 1 - (parameters(model) - goal) / weights
    for _, block in find_blocks(model):
        for name, part in list(block.named_modules()):
            if isinstance(part, nn.Linear):
                rank = int(share * part.weight.numel() / sum(part.weight.shape))
                parent, _, leaf = name.rpartition(".")
                factors = torch.randn(part.out_features, rank), torch.randn(rank, part.in_features)
                setattr(block.get_submodule(parent), leaf, LowRankLinear.from_factors(*factors, None))
    return model.requires_grad_(False)


def _two_of_four(weight: torch.Tensor) -> torch.Tensor:
    order = torch.rand(*weight.shape[:-1], weight.shape[-1] // 4, 4).argsort(-1)
    return (order < 2).view(weight.shape)


def _with_zeros(model: PreTrainedModel, dropped: Callable[[torch.Tensor], torch.Tensor]) -> PreTrainedModel:
    for _, block in find_blocks(model):
        for part in block.modules():
            if isinstance(part, nn.Linear):
                part.weight.data.masked_fill_(dropped(part.weight), 0)
    return model


def through_passes(sizes: dict[str, Any], passes: str) -> PreTrainedModel:
    """A dense model after a real pass."""
    model = llama(**sizes)
    recipe = parse_recipe(f"passes:\n- {passes}", "evals")
    windows_NT = torch.randint(32000, (2, 64), generator=torch.Generator().manual_seed(0))
    return apply_passes(
        model,
        map_model(model),
        recipe.passes,
        RunContext(windows_NT, batch=2),
    ).model


@click.command()
@click.option("--name", required=True, help="of the result file")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), default=("m110",), show_default=True)
@click.option("--clock", type=click.Choice(list(CLOCKS)), default="cpu", show_default=True, help="cpu: processor time")
@click.option("--threads", default=1, show_default=True, help="of torch; more than one with --clock wall")
@click.option("--prompt-tokens", default=128, show_default=True)
@click.option("--new-tokens", default=16, show_default=True)
@click.option("--repeats", default=7, show_default=True)
@click.option("--only", multiple=True, help="variants to measure beside `dense again`; default: all")
def main(
    name: str,
    shapes: tuple[str, ...],
    clock: str,
    threads: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    only: tuple[str, ...],
) -> None:
    """Measure every variant of every shape."""
    if threads > 1 and clock == "cpu":
        raise click.UsageError("processor time adds up what all threads took: use --clock wall with --threads")
    torch.set_num_threads(threads)
    rows = []
    for shape in shapes:
        sizes = SHAPES[shape]
        dense = llama(**sizes)
        assert parameters(dense) == closed_form(sizes)
        chosen = variants(sizes, dense)
        for method in dict.fromkeys(["dense again", *only] if only else chosen):
            model = chosen[method]()
            models = {"dense": dense, method: model}
            runners = {name: TorchRunner(each) for name, each in models.items()}
            prompt_1T = random_prompt(32000, tokens=prompt_tokens)
            results = compare_speed(
                runners,
                dict.fromkeys(models, prompt_1T),
                new_tokens=new_tokens,
                repeats=repeats,
                clock=CLOCKS[clock],
            )
            rows.append(_row(shape, method, models, results))
            click.echo(str(rows[-1]), err=True)
    facts = {
        "name": name,
        "clock": clock,
        "threads": torch.get_num_threads(),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "rows": rows,
        "versions": versions(),
        "machine": machine(),
    }
    path = Path(__file__).parent / "results" / f"speed-{name}.json"
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


def _row(shape: str, method: str, models: dict[str, PreTrainedModel], results: dict[str, Speed]) -> dict[str, Any]:
    """Rates, and their ratios to dense; `faster` is what the spread of the repeats allows to say."""
    result, dense = results[method], results["dense"]
    decode = result.decode.median / dense.decode.median
    noise = (result.decode.spread + dense.decode.spread) / 2
    return {
        "shape": shape,
        "method": method,
        "parameters": parameters(models[method]),
        "share": round(parameters(models[method]) / parameters(models["dense"]), 4),
        "decode": round(result.decode.median, 2),
        "decode_dense": round(dense.decode.median, 2),
        "decode_ratio": round(decode, 3),
        "decode_spread": round(result.decode.spread, 3),
        "prefill": round(result.prefill.median, 1),
        "prefill_ratio": round(result.prefill.median / dense.prefill.median, 3),
        "prefill_spread": round(result.prefill.spread, 3),
        "faster": bool(decode > 1 + min(noise, 0.1)),
    }


if __name__ == "__main__":
    main()
