"""Width pruning next to Torch-Pruning: the same model, calibration windows and text, at equal parameters.

    python evals/peers_width.py --name books-llama

Needs `pip install torch-pruning` in the same environment. Two comparisons: a quarter of the FFN channels, where both
remove the very same kind of unit; and everything that each would remove by itself, where Torch-Pruning also narrows the
residual stream, at the ratio that brings it nearest to our parameter count. Writes evals/results/peers-width-NAME.json.
"""

from __future__ import annotations

import json
import statistics
from importlib.metadata import version
from pathlib import Path

import click
import torch
import torch_pruning
from torch import nn
from transformers import PreTrainedModel
from trial import Setting, run_trial

from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.footprint import parameters
from llmcompress.evaluation.perplexity import perplexity
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.progress import Silent

OURS = {
    "l2": "- width: {{ratio: {ratio}, heads: {heads}, score: l2, refit: none}}",
    "taylor_first": "- width: {{ratio: {ratio}, heads: {heads}, score: taylor_first, refit: none}}",
    "taylor_first, refit": "- width: {{ratio: {ratio}, heads: {heads}, score: taylor_first}}",
    "default": "- width: {{ratio: {ratio}, heads: {heads}}}",
}
THEIRS = {
    "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
    "taylor": torch_pruning.importance.GroupTaylorImportance,
}


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True)
@click.option("--name", required=True)
@click.option("--ratio", default=0.25, show_default=True)
@click.option("--seeds", default=3, show_default=True)
def main(model: str, calibration: str, text: str, name: str, ratio: float, seeds: int) -> None:
    """Run both and write what came out."""
    setting = Setting(model, calibration, text)
    dense = run_trial(setting)
    rows = []
    for what, heads in (("channels", "false"), ("everything", "true")):
        count = 0
        for method, passes in OURS.items():
            trials = [run_trial(setting, passes.format(ratio=ratio, heads=heads), seed=seed) for seed in range(seeds)]
            count = trials[0].parameters
            found = [trial.perplexity.perplexity for trial in trials]
            rows.append(row(what, f"llmcompress {method}", [trial.parameters for trial in trials], found))
        share = ratio if what == "channels" else nearest_ratio(setting, count)
        for method in THEIRS:
            results = [theirs(setting, method, what, share, seed) for seed in range(seeds)]
            counts, found = [each[0] for each in results], [each[1] for each in results]
            rows.append(row(what, f"Torch-Pruning {method} {share:g}", counts, found))
    facts = {
        "model": name,
        "ratio": ratio,
        "dense": dense.perplexity.model_dump() | {"text": Path(text).name, "parameters": dense.parameters},
        "rows": rows,
        "versions": versions() | {"torch-pruning": version("torch-pruning")},
        "machine": machine(),
    }
    path = Path(__file__).parent / "results" / f"peers-width-{name}.json"
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


def row(what: str, method: str, counts: list[int], found: list[float]) -> dict[str, object]:
    """One line of the result."""
    click.echo(f"{what:12s} {method:34s} {statistics.mean(counts):.0f} {statistics.mean(found):.3f} {found}", err=True)
    return {"removed": what, "method": method, "parameters": counts, "perplexity": found}


def nearest_ratio(setting: Setting, count: int) -> float:
    """The ratio at which the peer comes nearest to that many parameters; how units are scored plays no part in it."""
    shares = [step / 100 for step in range(6, 24, 2)]
    counts = {share: parameters(peer(setting, "magnitude", "everything", share, seed=0)) for share in shares}
    return min(shares, key=lambda share: abs(counts[share] - count))


def theirs(setting: Setting, method: str, what: str, ratio: float, seed: int) -> tuple[int, float]:
    """Parameters and perplexity of the peer."""
    pruned = peer(setting, method, what, ratio, seed)
    tokenizer = load_for_compression(find_source(setting.model), dtype=torch.float32).tokenizer
    result = perplexity(pruned, tokenizer, setting.task, device=torch.device("cpu"), progress=Silent())
    return parameters(pruned), result.perplexity


def peer(setting: Setting, method: str, what: str, ratio: float, seed: int) -> PreTrainedModel:
    """Torch-Pruning as its own example for language models uses it; gradients over our calibration windows."""
    loaded = load_for_compression(find_source(setting.model), dtype=torch.float32)
    model, config = loaded.model, loaded.model.config
    settings = Calibration(source=str(setting.calibration), samples=setting.samples, tokens=setting.tokens)
    data = calibration_windows(settings, loaded.tokenizer, max_positions=setting.window, seed=seed, progress=Silent())
    model.requires_grad_(True)
    config.use_cache = False  # its tracer follows every output, and a cache is no tensor
    heads: dict[nn.Module, int] = {}
    channels: dict[nn.Module, float] = {}
    for layer in model.model.layers:
        attention = layer.self_attn
        heads[attention.q_proj] = config.num_attention_heads
        heads[attention.k_proj] = heads[attention.v_proj] = config.num_key_value_heads
        channels |= {layer.mlp.gate_proj: ratio, layer.mlp.up_proj: ratio}
    only = what == "channels"
    fixed = [model.lm_head]
    if only:
        others = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
        fixed += [layer.get_submodule(name) for layer in model.model.layers for name in others]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs=data.windows_NT[:1, :7],
        importance=THEIRS[method](group_reduction="mean"),
        pruning_ratio=0.0 if only else ratio,
        pruning_ratio_dict=channels if only else None,
        ignored_layers=fixed,
        num_heads=heads,
        prune_num_heads=not only,
        prune_head_dims=False,
        head_pruning_ratio=0.0 if only else ratio,
    )
    if method == "taylor":
        for ids_BT in torch.split(data.windows_NT, 8):
            model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    for group in pruner.step(interactive=True):
        group.prune()
    for layer in model.model.layers:
        attention = layer.self_attn
        query, key = (linear.out_features // attention.head_dim for linear in (attention.q_proj, attention.k_proj))
        attention.num_key_value_groups = query // key
    model.model.embed_tokens.embedding_dim = model.lm_head.in_features
    # the example leaves embedding and head apart; they hold the same numbers, and one copy is what is saved
    if config.tie_word_embeddings:
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        model.lm_head.weight = model.model.embed_tokens.weight
    model.zero_grad(set_to_none=True)
    return model.requires_grad_(False).eval()


if __name__ == "__main__":
    main()
