"""Factoring sites: exact at full rank, never more error than the spectrum says, ranks under one budget."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from llmcompress.modules.low_rank import LowRankLinear
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.numerics import loss
from llmcompress.numerics.low_rank import break_even
from llmcompress.numerics.rank_allocation import uniform_rank
from llmcompress.numerics.statistics import Gram
from llmcompress.passes.decomposition import ranks
from llmcompress.run import Run
from llmcompress.sensitivity import perplexity as measured_perplexity
from llmcompress.sensitivity.gradients import squared_gradients
from tests.families import FAMILIES, tiny_model
from tests.passes.decomposition.factored import block_pass, compressed, logits, map_of, whole_model, windows


def factored(model: nn.Module) -> dict[str, LowRankLinear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, LowRankLinear)}


def weight_of(module: Any, transposed: bool) -> torch.Tensor:
    if isinstance(module, LowRankLinear):
        return module.dense_weight()
    return module.weight.T if transposed else module.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_of_the_rank_that_weights_have_leave_the_logits(family: str) -> None:
    """With biases, Conv1D, shared inputs and experts: every site becomes two factors, and nothing changes."""
    thin = tiny_model(family, seed=1)
    for block in map_of(family).blocks:
        for site in block.structure.sites:
            weight = thin.get_submodule(block.full(site.name)).weight
            left, sigma, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
            with torch.no_grad():
                weight.copy_(left[:, :3] * sigma[:3] @ right[:3])
    before = logits(thin)
    model, rows = compressed(family, block_pass("svd", rank=3), model=thin)
    assert {row.site for row in rows} == set(map_of(family).site_names()) == set(factored(model))
    assert all(row.rank == 3 and (row.error is None or row.error < 1e-6) for row in rows)
    torch.testing.assert_close(logits(model), before, atol=2e-4 * float(before.abs().max()), rtol=0)


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "llama_odd"])
@pytest.mark.parametrize("options", [{}, {"whitening": "none"}, {"whitening": "activation"}], ids=str)
def test_a_rank_that_saves_nothing_leaves_the_site_dense_and_says_so(family: str, options: dict[str, Any]) -> None:
    model, rows = compressed(family, block_pass("svd", rank=1000, **options))
    assert not factored(model)
    assert torch.equal(logits(model), logits(tiny_model(family, seed=1)))
    assert all(row.degraded and "kept dense" in row.degraded and row.rank is None for row in rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_rank_times_outputs_plus_inputs_and_no_more_than_asked_for(family: str) -> None:
    model, rows = compressed(family, block_pass("svd", fraction=0.3, ranks="uniform"))
    sizes = {
        block.full(s.name): (s.outputs, s.inputs) for block in map_of(family).blocks for s in block.structure.sites
    }
    parts = factored(model)
    assert {row.site for row in rows if row.rank} == set(parts)
    for row in rows:
        outputs, inputs = sizes[row.site]
        here = parts[row.site]
        assert row.rank is not None and row.rank < break_even(outputs, inputs)
        weights = sum(part.numel() for name, part in here.named_parameters() if name.endswith("weight"))
        assert row.parameters == row.rank * (outputs + inputs) == weights
        assert row.parameters <= 0.7 * outputs * inputs


def test_overrides_give_other_ranks_and_sites_outside_stay_bit_identical() -> None:
    mixed = block_pass("svd", sites="*.mlp.*", rank=4, overrides={"*.down_proj": {"rank": 6}})
    model, rows = compressed("llama", mixed)
    assert {row.site.rpartition(".")[2]: row.rank for row in rows} == {"gate_proj": 4, "up_proj": 4, "down_proj": 6}
    before = tiny_model("llama", seed=1).state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items() if ".mlp." not in key)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral"])
def test_inputs_are_those_that_the_blocks_factored_before_really_give(family: str) -> None:
    """The reported error of a site is what its outputs lose on the inputs of the first block, measured from outside."""
    model, rows = compressed(family, block_pass("svd", fraction=0.5, ranks="uniform"))
    first = map_of(family).blocks[0]
    errors = {row.site: row for row in rows}
    dense = tiny_model(family, seed=1)
    for site in first.structure.sites[:1]:
        name = first.full(site.name)
        seen: list[torch.Tensor] = []
        hook = dense.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            dense(windows())
        hook.remove()
        x_TI = torch.cat([each.reshape(-1, site.inputs) for each in seen]).double()
        weight = weight_of(dense.get_submodule(name), site.transposed).double()
        change = weight_of(model.get_submodule(name), False).double() - weight
        lost = float(((x_TI @ change.T).square().sum() / (x_TI @ weight.T).square().sum()).detach())
        assert errors[name].error == pytest.approx(lost, rel=1e-3)
        assert errors[name].tokens == len(x_TI)


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2"])
def test_the_gram_matrix_loses_less_than_no_metric_on_the_first_inputs(family: str) -> None:
    """Of the first input group: later ones see other inputs."""
    errors = []
    for whitening in ("gram", "none"):
        model, _ = compressed(family, block_pass("svd", fraction=0.5, ranks="uniform", whitening=whitening))
        whole = whole_model(family)
        block = next(iter(whole.stream()))
        sites = block.input_groups()[0]
        block.measure(sites, (Gram,))
        total = 0.0
        for site in sites:
            change = (model.get_submodule(site.name).dense_weight() - site.weight_OI).double()
            total += float(((change @ site.statistic(Gram).sum_II.double()) * change).sum().detach())
        errors.append(total)
    assert errors[0] < errors[1]


@pytest.mark.parametrize("rule", ["energy", "loss"])
@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "qwen3_moe"])
def test_decided_ranks_keep_to_one_budget(family: str, rule: str) -> None:
    chosen = block_pass("svd", fraction=0.3, ranks=rule, round_to=2)
    whole = whole_model(family)
    before = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    decided = chosen.decide(whole)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.model.state_dict().items())
    assert all(not parameter.grad for parameter in whole.model.parameters())
    assert set(decided) == set(map_of(family).site_names())
    model, rows = compressed(family, chosen)
    _, uniform = compressed(family, block_pass("svd", fraction=0.3, ranks="uniform", round_to=2))
    equal = sum(row.parameters or 0 for row in uniform)
    assert 0.95 * equal < sum(row.parameters or 0 for row in rows) <= equal
    for row in rows:
        assert (row.rank is None and row.degraded) or row.rank == int(decided[row.site])
    assert len({row.rank for row in rows}) > 1
    assert set(factored(model)) == {row.site for row in rows if row.rank}


def test_an_override_can_fix_a_rank_and_the_budget_is_of_the_others() -> None:
    fixed = {"*.down_proj": {"fraction": None, "rank": 5}}
    _, rows = compressed("llama_gqa", block_pass("svd", fraction=0.3, overrides=fixed))
    _, uniform = compressed("llama_gqa", block_pass("svd", fraction=0.3, ranks="uniform", exclude="*.down_proj"))
    others = [row.parameters or 0 for row in rows if "down_proj" not in row.site]
    assert (
        0.9 * sum(row.parameters or 0 for row in uniform) < sum(others) <= sum(row.parameters or 0 for row in uniform)
    )
    assert {row.rank for row in rows if "down_proj" in row.site} == {5}


@pytest.mark.parametrize("after", [9.0, 11.0])
def test_ranks_by_loss_stay_uniform_unless_the_loss_falls(monkeypatch: pytest.MonkeyPatch, after: float) -> None:
    whole, chosen = whole_model("llama_gqa"), block_pass("svd", fraction=0.3)
    measured = iter([10.0, after])
    monkeypatch.setattr(ranks, "perplexity", lambda _: next(measured))
    decided = chosen.decide(whole)
    uniform = {
        block.full(site.name): uniform_rank(site.outputs, site.inputs, 0.7, 1)
        for block in map_of("llama_gqa").blocks
        for site in block.structure.sites
    }
    assert ({name: int(rank) for name, rank in decided.items()} == uniform) == (after > 10)


def test_spectra_wait_in_the_run_folder_and_an_interrupted_decision_finds_them_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks are those found in memory; the second time no spectrum is computed."""
    each, whole = block_pass("svd", fraction=0.3, ranks="loss", exclude="*.0.*.q_proj"), whole_model("llama_gqa")
    in_memory = each.decide(whole.within(whole.context.at("00")))
    with Run.open(tmp_path / "out", fingerprint={"recipe": "1"}, lock_text="", fresh=False) as run:
        kept = whole.within(replace(whole.context.at("00"), keep=run))
        first = each.decide(kept)
        files = [path.name for path in (run.folder / "work").iterdir()]
        monkeypatch.setattr(ranks, "output_spectrum", None)
        second = each.decide(kept)
    assert len([name for name in files if "-spectra-" in name]) == len(whole.map.blocks)
    assert in_memory == first == second and list(first) == list(second)


def test_squared_gradients_equal_those_taken_one_site_at_a_time() -> None:
    whole = whole_model("llama_gqa")
    names = list(map_of("llama_gqa").site_names())[:4]
    found = squared_gradients(whole, names)
    for name in names:
        model = tiny_model("llama_gqa", seed=1)
        kept: list[torch.Tensor] = []

        def keep(_: Any, __: Any, output: torch.Tensor, kept: list[torch.Tensor] = kept) -> None:
            output.retain_grad()
            kept.append(output)

        model.get_submodule(name).register_forward_hook(keep)
        expected = torch.zeros_like(found[name])
        for ids in windows().split(4):
            out = model(ids).logits[:, :-1]
            (len(ids) * nn.functional.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten())).backward()
            grad = kept.pop().grad
            assert grad is not None
            expected += grad.flatten(0, 1).square().sum(0)
        torch.testing.assert_close(found[name], expected)


def test_refitted_left_factors_lose_no_more_on_the_inputs_that_the_factored_block_gives() -> None:
    plain, refitted = (block_pass("svd", fraction=0.5, ranks="uniform", refit=refit) for refit in (False, True))
    models = [compressed("llama_gqa", each) for each in (plain, refitted)]
    first = map_of("llama_gqa").blocks[0]
    name = first.full("mlp.down_proj")
    # the inputs of the last linear of the first block differ between the two, so each is measured on the second's
    refit = models[1][0]
    seen: list[torch.Tensor] = []
    hook = refit.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        refit(windows())
    hook.remove()
    x_TI = torch.cat([each.flatten(0, 1) for each in seen])
    weight = tiny_model("llama_gqa", seed=1).get_submodule(name).weight
    with torch.no_grad():
        errors = [float((x_TI @ (m.get_submodule(name).dense_weight() - weight).T).square().sum()) for m, _ in models]
        whole = float((x_TI @ weight.T).square().sum())
    assert errors[1] < errors[0]
    row = next(row for row in models[1][1] if row.site == name)
    assert row.error == pytest.approx(errors[1] / whole, rel=1e-3)


def test_how_many_windows_go_at_once_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = whole_model("llama_gqa")
    names = list(map_of("llama_gqa").site_names())
    before = squared_gradients(whole, names)
    monkeypatch.setattr(loss, "LOGITS_BYTES", 1)
    assert {len(ids) for ids in whole.batches()} == {1}
    for name, found in squared_gradients(whole, names).items():
        torch.testing.assert_close(found, before[name], rtol=1e-3, atol=1e-3 * float(before[name].max()))


def test_no_tokens_means_plain_singular_values_and_the_row_says_so() -> None:
    """Experts to which no calibration token was routed."""
    data = torch.full((1, 2), 5)
    model, rows = compressed("qwen3_moe", block_pass("svd", fraction=0.3, ranks="uniform"), data=data)
    assert torch.isfinite(logits(model)).all()
    for row in rows:
        assert (row.tokens == 0) == bool(row.degraded and "no tokens" in row.degraded), row


def test_svd_is_deterministic() -> None:
    chosen = block_pass("svd", fraction=0.3, ranks="loss", refit=True)
    (one, rows), (two, rows_again) = compressed("llama", chosen), compressed("llama", chosen)
    assert rows == rows_again
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_without_data_only_plain_singular_values_work() -> None:
    assert not block_pass("svd", whitening="none", rank=3).uses_data()
    assert not block_pass("svd", whitening="none", ranks="uniform").uses_data()
    assert not block_pass("svd", whitening="none", ranks="energy").uses_data()
    assert block_pass("svd", whitening="none").uses_data() and block_pass("svd", ranks="uniform").uses_data()
    none = torch.zeros((0, 24), dtype=torch.long)
    with_data, _ = compressed("llama", block_pass("svd", whitening="none", ranks="energy"))
    without, rows = compressed("llama", block_pass("svd", whitening="none", ranks="energy"), data=none)
    assert torch.equal(logits(with_data), logits(without))
    assert all(row.error is None for row in rows)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fraction": 0.2, "rank": 4}, "not both"),
        ({"rank": 4, "ranks": "loss"}, "needs a `fraction`"),
        ({"alpha": 0.5}, "whitening: activation"),
        ({"overrides": {"*": {"whitening": "none"}}}, "cannot be overridden per site"),
        ({"fraction": 1.0}, "less than 1"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        block_pass("svd", **options)


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "opt", "qwen3_moe"])
def test_quantizers_work_on_the_factors_that_svd_left(family: str) -> None:
    model, rows = compressed(
        family, block_pass("svd", rank=12, exclude="*.0.*"), block_pass("gptq", scheme="int8_channel")
    )
    by_pass = {name: {row.site for row in rows if row.algorithm == name} for name in ("svd", "gptq")}
    assert {f"{site}.{part}" for site in by_pass["svd"] for part in ("right", "left")} <= by_pass["gptq"]
    for site in by_pass["svd"]:
        module = model.get_submodule(site)
        assert isinstance(module.right, QuantLinear) and isinstance(module.left, QuantLinear)
    alone, _ = compressed(family, block_pass("svd", rank=12, exclude="*.0.*"))
    assert (logits(model) - logits(alone)).abs().median() < 0.02 * logits(alone).abs().max()


def test_factors_survive_the_checkpoints_dtype_unchanged() -> None:
    model, _ = compressed("llama_gqa", block_pass("svd", fraction=0.3), dtype=torch.bfloat16)
    for key, tensor in model.model.layers.state_dict().items():
        assert torch.equal(tensor, tensor.bfloat16().float()), key


@pytest.mark.parametrize("rows", [64, 3])
def test_perplexity_does_not_depend_on_how_many_rows_have_their_logits_at_once(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = whole_model("llama_gqa")
    monkeypatch.setattr(measured_perplexity, "rows_at_once", lambda _: rows)
    model, ids = tiny_model("llama_gqa", seed=1), whole.context.windows_NT
    with torch.no_grad():
        expected = loss.next_token_loss(model(ids).logits, ids).exp()
    assert measured_perplexity.perplexity(whole) == pytest.approx(float(expected), rel=1e-5)
