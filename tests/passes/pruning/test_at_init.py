"""snip, grasp, synflow, reinitialise: scores equal their definitions, counts are exact, synflow empties no layer."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.numerics.masks import count_of_zeros
from llmcompress.numerics.synflow import synflow_scores
from llmcompress.passes.apply import Compressed, apply_passes
from llmcompress.passes.base import PASSES, Pass
from llmcompress.passes.pruning.flow_graph import flow_stages
from llmcompress.passes.pruning.grasp import GraSP
from llmcompress.passes.pruning.snip import SNIP
from tests.families import FAMILIES, tiny_model, tiny_tokens

CPU = torch.device("cpu")
SCORES = ("snip", "grasp", "synflow")


@cache
def map_of(family: str) -> ModelMap:
    return map_model(tiny_model(family))


def compressed(model: PreTrainedModel, family: str, *passes: Pass) -> Compressed:
    return apply_passes(model, map_of(family), passes, RunContext(tiny_tokens(family, batch=4), batch=3, device=CPU))


def whole_model(model: PreTrainedModel, family: str, batch: int = 3) -> WholeModel:
    return WholeModel(model, map_of(family), RunContext(tiny_tokens(family, batch=4), batch=batch, device=CPU))


def site_weights(model: PreTrainedModel, family: str) -> dict[str, Tensor]:
    return {site.name: site.weight_OI for site in whole_model(model, family).sites()}


def options(name: str) -> dict[str, Any]:
    return {"rounds": 5} if name == "synflow" else {}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SCORES)
def test_exactly_the_asked_share_becomes_zero_and_the_rest_is_untouched(name: str, family: str) -> None:
    model = tiny_model(family)
    before = site_weights(model, family)
    everything = {key: each.detach().clone() for key, each in model.named_parameters()}
    rows = compressed(model, family, PASSES[name](sparsity=0.6, **options(name))).rows  # type: ignore[call-arg]
    after = site_weights(model, family)
    zeros = sum(int((each == 0).sum()) for each in after.values())
    assert zeros == count_of_zeros(0.6, sum(each.numel() for each in after.values()))
    for site, weight in after.items():
        assert torch.equal(weight[weight != 0], before[site][weight != 0])
    outside = {key for key, each in model.named_parameters() if not torch.equal(each, everything[key])}
    assert outside <= {f"{site}.weight" for site in after}
    assert {row.site for row in rows} == set(after)
    assert all(row.sparsity == int((after[row.site] == 0).sum()) / after[row.site].numel() for row in rows)


@pytest.mark.parametrize("name", SCORES)
def test_within_layers_every_site_gets_its_share_and_old_zeros_count(name: str) -> None:
    model = tiny_model("llama_odd")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:10] = 0
    old = model.model.layers[1].mlp.up_proj.weight == 0
    compressed(model, "llama_odd", PASSES[name](sparsity=0.37, comparison="layer", **options(name)))  # type: ignore[call-arg]
    for weight in site_weights(model, "llama_odd").values():
        assert int((weight == 0).sum()) == count_of_zeros(0.37, weight.numel())
    assert (model.model.layers[1].mlp.up_proj.weight[old] == 0).all()


@pytest.mark.parametrize("name", SCORES)
def test_only_selected_sites_are_pruned_and_the_result_is_deterministic(name: str) -> None:
    chosen = PASSES[name](sparsity=0.5, sites="*.mlp.*", exclude="*.0.*", **options(name))  # type: ignore[call-arg]
    model, again = tiny_model("llama_gqa"), tiny_model("llama_gqa")
    compressed(model, "llama_gqa", chosen)
    compressed(again, "llama_gqa", chosen)
    for site, weight in site_weights(model, "llama_gqa").items():
        selected = ".mlp." in site and ".layers.0." not in site
        assert bool((weight == 0).any()) == selected, site
        assert torch.equal(weight, site_weights(again, "llama_gqa")[site])


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "bloom"])
def test_snip_is_the_derivative_of_the_loss_in_connections_that_are_turned_down(family: str) -> None:
    """The paper's definition: every weight is c·w, and the score is |dL/dc| at c = 1."""
    model = tiny_model(family).double()
    ids = tiny_tokens(family, batch=4)
    whole = whole_model(tiny_model(family), family)
    found = SNIP(sparsity=0.5).masks(whole, whole.sites())
    sites = whole_model(model, family).sites()
    parameters = dict(model.named_parameters())
    connections = {f"{site.name}.weight": torch.ones_like(parameters[f"{site.name}.weight"]) for site in sites}
    for each in connections.values():
        each.requires_grad_()
    turned = {name: parameters[name].detach() * each for name, each in connections.items()}
    logits = functional_call(model, turned, kwargs={"input_ids": ids, "use_cache": False}).logits[:, :-1]
    functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)).backward()
    scores = [connections[f"{site.name}.weight"].grad.abs() for site in sites]  # type: ignore[union-attr]
    scores = [score.T if site.info.transposed else score for site, score in zip(sites, scores, strict=True)]
    everything = torch.cat([score.flatten() for score in scores])
    masks = torch.cat([mask.flatten() for mask in found])
    # float32 against float64: only scores next to the threshold may swap sides
    threshold = everything.kthvalue(count_of_zeros(0.5, len(everything))).values
    clear = (everything - threshold).abs() > 1e-3 * threshold
    assert torch.equal(masks[clear], (everything < threshold)[clear]) and clear.float().mean() > 0.95


@pytest.mark.parametrize("family", ["llama_gqa", "gpt_neox", "bloom", "gemma2"])
def test_hessian_times_gradient_equals_the_difference_of_two_gradients(family: str) -> None:
    model = tiny_model(family).double()
    # whatever implementation the loader chose: the fused one has no second derivative on its own
    if family in ("llama_gqa", "gpt_neox"):
        model.set_attn_implementation("sdpa")
    whole = whole_model(model, family)
    weights = [site.module.get_parameter("weight") for site in whole.sites()]
    grasp = GraSP()
    ids = tiny_tokens(family, batch=4)

    def gradient() -> list[Tensor]:
        return list(torch.autograd.grad(grasp._loss(model, ids), weights))

    pass_masks_context = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with pass_masks_context:
        products = grasp._hessian_gradient(model, whole, weights)
    base, step = gradient(), 1e-4 / max(float(each.abs().max()) for each in gradient())
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for weight, direction in zip(weights, base, strict=True):
                weight.add_(sign * step * direction)
        ends.append(gradient())
        with torch.no_grad():
            for weight, direction in zip(weights, base, strict=True):
                weight.sub_(sign * step * direction)
    for product, after, before in zip(products, *ends, strict=True):
        expected = (after - before) / (2 * step)
        # the model's own norms and our loss compute in float32
        scale = float(torch.cat([each.flatten() for each in products]).abs().max())
        torch.testing.assert_close(product, expected, atol=1e-3 * scale, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_synflow_never_empties_a_site_at_99_percent(family: str) -> None:
    model = tiny_model(family)
    compressed(model, family, PASSES["synflow"](sparsity=0.99, rounds=15))  # type: ignore[call-arg]
    for site, weight in site_weights(model, family).items():
        assert int((weight != 0).sum()) > 0, site


@pytest.mark.parametrize("family", FAMILIES)
def test_the_flow_through_every_block_is_conserved_between_its_linears(family: str) -> None:
    model = tiny_model(family)
    whole = whole_model(model, family)
    blocks = [flow_stages(info.structure) for info in whole.map.blocks]
    every = {site.name: site.weight_OI.double() for site in whole.sites()}
    weights = [{s.name: every[info.full(s.name)] for s in info.structure.sites} for info in whole.map.blocks]
    scores = synflow_scores(whole.map.hidden_size, blocks, weights)
    scored = set()
    for stages, block_scores in zip(blocks, scores, strict=True):
        for branch in (branch for stage in stages for branch in stage):
            assert branch.consumer is not None, "every linear of these families has its place"
            flow = block_scores[branch.consumer].sum()
            torch.testing.assert_close(flow, torch.ones_like(flow), rtol=1e-9, atol=0)
            places: dict[str, int] = {}
            for name in [branch.source, *(factor.site for factor in branch.factors)]:
                assert name is not None
                places[name] = places.get(name, 0) + 1
            for name, count in places.items():
                # a fused projection stands in the path once for its values and once for its queries and keys
                torch.testing.assert_close(block_scores[name].sum(), count * flow, rtol=1e-9, atol=0)
            scored |= {branch.consumer, *places}
    assert {info.full(name) for info in whole.map.blocks for name in scored} >= set(every)


def test_reinitialising_gives_the_same_fresh_weights_for_the_same_seed() -> None:
    models = [tiny_model("gpt2", seed=seed) for seed in (1, 2, 3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        compressed(model, "gpt2", PASSES["reinitialise"](seed=seed))  # type: ignore[call-arg]
    first, same, other = (site_weights(model, "gpt2") for model in models)
    for name, weight in first.items():
        assert torch.equal(weight, same[name]) and not torch.equal(weight, other[name])
        assert float(weight.std()) == pytest.approx(0.02, rel=0.8), "the family's own initialisation, not ours"


def test_reinitialising_around_zeros_keeps_exactly_those() -> None:
    model = tiny_model("gpt2")
    compressed(model, "gpt2", PASSES["magnitude"](sparsity=0.5))
    before = site_weights(model, "gpt2")
    compressed(model, "gpt2", PASSES["reinitialise"](seed=0, keep_zeros=True))  # type: ignore[call-arg]
    for name, weight in site_weights(model, "gpt2").items():
        assert torch.equal(weight == 0, before[name] == 0) and not torch.equal(weight, before[name])


def test_only_a_reinitialisation_that_keeps_zeros_may_follow_pruning() -> None:
    assert PASSES["reinitialise"]().conflict_with("zeros")
    assert PASSES["reinitialise"](keep_zeros=True).conflict_with("zeros") is None  # type: ignore[call-arg]
    assert PASSES["reinitialise"](keep_zeros=True).conflict_with("shapes")  # type: ignore[call-arg]
