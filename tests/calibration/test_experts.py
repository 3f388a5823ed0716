"""Experts as linears under both majors: unfused exactly, measured on the tokens asked for, loaded by stock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.stream import BlockStream
from llmcompress.errors import CompressError
from llmcompress.evaluation.coverage import coverage_warnings
from llmcompress.exporters.save import save_model
from llmcompress.model.experts import unfuse_experts
from llmcompress.model.probe import map_model, probe
from llmcompress.modules.experts import UnfusedExperts
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.numerics.statistics import Gram
from llmcompress.passes.apply import apply_passes
from llmcompress.recipe import parse_recipe
from llmcompress.records.rows import SiteReport
from llmcompress.run import Run
from tests.families import VOCABULARY, tiny_config, tiny_model, tiny_tokens
from tests.warm_python import WarmPython

MOE = ["mixtral", "qwen3_moe"]
FIVE = transformers.__version__.startswith("5.")
WINDOWS = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))
LOAD = """
import sys, json, torch
from transformers import AutoModelForCausalLM
for folder in json.loads(sys.argv[1]):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        torch.save(model.eval()(torch.load(folder + "/ids.pt")).logits, folder + "/logits.pt")
print("llmcompress" in sys.modules)
"""


def unfused(family: str) -> Any:
    model = tiny_model(family, seed=1)
    unfuse_experts(model)
    return model


def apply(family: str, passes: str, **options: Any) -> Any:
    model = unfused(family)
    return apply_passes(
        model,
        map_model(model),
        parse_recipe(f"passes: {passes}", "test").passes,
        RunContext(WINDOWS, batch=4, **options),
    )


@pytest.mark.parametrize("family", MOE)
@torch.no_grad()
def test_experts_taken_apart_compute_what_the_bank_computes_and_are_stored_as_it_bit_for_bit(
    family: str, tmp_path: Path
) -> None:
    stock, model = tiny_model(family, seed=1), unfused(family)
    assert any(isinstance(part, UnfusedExperts) for part in model.modules()) == FIVE
    torch.testing.assert_close(model(WINDOWS).logits, stock(WINDOWS).logits, atol=1e-5, rtol=1e-5)
    save_model(model, tmp_path, "auto", storage_dtype=torch.float32, max_shard_size="5GB")
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again, before = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), stock.state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in again.items())


@pytest.mark.parametrize("family", MOE)
def test_the_map_of_the_config_and_of_the_model_name_every_expert(family: str) -> None:
    found = map_model(unfused(family))
    assert found.site_names() == probe(tiny_config(family), unfuse=True).site_names()
    assert sum(".experts." in name for name in found.site_names()) == 2 * 4 * 3
    refused = {row.reason.split(":")[0] for block in found.blocks for row in block.structure.refused}
    assert refused == {"router"}


def _holder_inputs(model: Any, layer: int) -> Tensor:
    """What comes into the module that holds a layer's experts, for all windows."""
    name = next(n for n, _ in model.named_modules() if n.endswith(f"layers.{layer}.mlp") or n.endswith("moe"))
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for ids in WINDOWS.split(4):
            model(ids, use_cache=False)
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("experts", ["routed", "all"])
@pytest.mark.parametrize("family", MOE)
def test_an_expert_is_measured_on_its_tokens_or_on_all_of_them(family: str, experts: Any) -> None:
    model = unfused(family)
    x = _holder_inputs(model, 0)
    stream = BlockStream(
        model,
        map_model(model),
        RunContext(WINDOWS, batch=4, experts=experts),
    )
    work = next(iter(stream))
    before = work.outputs()
    work.measure(work.sites, (Gram,))
    tokens: dict[str, int] = {}
    for site in work.sites:
        gram = site.statistic(Gram)
        tokens[site.info.name] = gram.tokens
        first = site.info.name.endswith(("gate_proj", "up_proj", "w1", "w3")) and ".experts." in site.name
        if experts == "all" and first:
            scale = float((x.T @ x).abs().max())
            torch.testing.assert_close(gram.sum_II, x.T @ x, atol=1e-4 * scale, rtol=1e-4)
    of_experts = {name: count for name, count in tokens.items() if "experts" in name}
    assert all(count == WINDOWS.numel() for name, count in tokens.items() if name not in of_experts)
    if experts == "all":
        assert set(of_experts.values()) == {WINDOWS.numel()}
    else:
        firsts = [n for name, n in of_experts.items() if name.endswith(("gate_proj", "w1"))]
        assert sum(firsts) == 2 * WINDOWS.numel(), "two experts for every token"
    assert all(torch.equal(a, b) for a, b in zip(work.outputs(), before, strict=True)), "nothing stays attached"


@pytest.mark.parametrize("family", MOE)
@torch.no_grad()
def test_an_expert_without_tokens_is_calibrated_when_all_are_asked_for(family: str) -> None:
    """A router that always prefers two experts starves the others."""

    def starved() -> Any:
        model = unfused(family)
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter[2:] = 0
                parameter[:2] = 0
        return model

    def run(experts: Any) -> dict[str, SiteReport]:
        model = starved()
        rows = apply_passes(
            model,
            map_model(model),
            parse_recipe("passes: [{gptq: {scheme: int3_channel, sites: '*.experts.*'}}]", "test").passes,
            RunContext(WINDOWS, batch=4, experts=experts),
        ).rows
        return {row.site: row for row in rows}

    routed, every = run("routed"), run("all")
    starving = [site for site, row in routed.items() if row.tokens == 0]
    assert len(starving) == 2 * 2 * 3
    assert all("no tokens" in (routed[site].degraded or "") for site in starving)
    assert all(row.tokens == WINDOWS.numel() and not row.degraded for row in every.values())


def test_the_warning_names_the_expert_with_the_fewest_tokens() -> None:
    rows = [
        SiteReport(site=f"model.layers.0.mlp.experts.{number}.up_proj", algorithm="gptq", tokens=tokens)
        for number, tokens in enumerate((500, 64, 3))
    ] + [SiteReport(site="model.layers.0.self_attn.q_proj", algorithm="gptq", tokens=10)]
    found = probe(tiny_config("qwen3_moe"), unfuse=True)
    (said,) = coverage_warnings(rows, found)
    assert said.startswith("1 of 3") and "experts.2.up_proj, 3 tokens for 64" in said and "experts: all" in said
    assert coverage_warnings(rows[:2], found) == []


SCHEMES = ["int4_g32", "int3_channel", "int8_channel", "int4_g32_asym"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, stock_python: WarmPython) -> dict[str, Path]:
    root, folders = tmp_path_factory.mktemp("experts"), {}
    jobs = {f"{family} {scheme}": (family, f"[{{gptq: {{scheme: {scheme}}}}}]") for family in MOE for scheme in SCHEMES}
    jobs["dense experts"] = ("mixtral", "[{rtn: {scheme: int4_g32, exclude: '*.experts.*'}}]")
    jobs["pruned"] = ("qwen3_moe", "[{wanda: {sparsity: 0.5}}]")
    jobs["some experts"] = ("qwen3_moe", "[{rtn: {scheme: int4_g32, exclude: '*.experts.0.*'}}]")
    if not FIVE:
        del jobs["dense experts"], jobs["some experts"]  # other majors merge them: what 4.57 writes is for itself
    for number, (name, (family, passes)) in enumerate(jobs.items()):
        model, folder = apply(family, passes).model, root / str(number)
        result = save_model(model, folder, "auto", storage_dtype=torch.float32, max_shard_size="5GB")
        expected = "plain" if name in ("dense experts", "pruned", "some experts") else "compressed-tensors"
        assert result.format == expected, (name, result.dense_sites)
        ids = tiny_tokens(family)
        torch.save(ids, folder / "ids.pt")
        with torch.no_grad():
            torch.save(model(ids).logits, root / f"{number}.pt")
        folders[name] = folder
    done = stock_python.run(LOAD, json.dumps([str(folder) for folder in folders.values()]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "False"
    return folders


def test_stock_transformers_loads_experts_of_codes_with_the_same_logits(saved: dict[str, Path]) -> None:
    for name, folder in saved.items():
        theirs, ours = torch.load(folder / "logits.pt"), torch.load(folder.with_suffix(".pt"))
        torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=2e-5, msg=name)


def test_experts_lie_in_the_folder_under_their_own_names_as_codes(saved: dict[str, Path]) -> None:
    from safetensors import safe_open

    leaves = {"mixtral": "block_sparse_moe.experts.3.w2", "qwen3_moe": "mlp.experts.3.up_proj"}
    for family, leaf in leaves.items():
        with safe_open(saved[f"{family} int4_g32"] / "model.safetensors", framework="pt") as file:
            assert file.get_tensor(f"model.layers.1.{leaf}.weight_packed").dtype == torch.int32


def test_factors_of_experts_are_refused_where_experts_are_a_bank_and_saved_where_they_are_linears(
    tmp_path: Path,
) -> None:
    def save(sites: str, name: str) -> str:
        model = apply("qwen3_moe", f"[{{svd: {{fraction: 0.2, sites: '{sites}'}}}}]").model
        return save_model(model, tmp_path / name, "auto", storage_dtype=torch.float32, max_shard_size="5GB").format

    if FIVE:
        with pytest.raises(CompressError, match="compressed experts only") as refused:
            save("*.experts.*", "experts")
        assert "experts" in refused.value.fix
    else:
        assert save("*.experts.*", "experts") == "llmcompress"
    assert save("*.self_attn.*", "attention") == "llmcompress"


@pytest.mark.parametrize("family", MOE)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, family: str) -> None:
    def run() -> Any:
        with Run.open(tmp_path / "out", fingerprint={}, lock_text="", fresh=False) as kept:
            return apply(family, "[{gptq: {scheme: int4_g32}}]", keep=kept)

    first, again = run(), run()
    assert again.rows == first.rows
    assert sum(isinstance(part, QuantLinear) for part in again.model.modules()) == 2 * (4 + 12)
    with torch.no_grad():
        assert torch.equal(again.model(WINDOWS).logits, first.model(WINDOWS).logits)


def test_a_bank_that_is_not_understood_stays() -> None:
    model = tiny_model("llama_gqa")
    model.model.layers[0].mlp.bank = nn.Module()
    model.model.layers[0].mlp.bank.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 4))
    model.model.layers[0].mlp.bank.down_proj = nn.Parameter(torch.zeros(2, 4, 4))
    assert unfuse_experts(model) == []
