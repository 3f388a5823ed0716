"""Codes of bitsandbytes: made by the package, saved in transformers' words, loaded without us with the same logits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.footprint import footprint
from llmcompress.exporters.save import save_model
from llmcompress.model.probe import map_model
from llmcompress.modules.bnb_linear import BnbLinear
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES
from llmcompress.recipe import parse_recipe
from llmcompress.run import Run
from tests.families import VOCABULARY, tiny_config, tiny_model, tiny_tokens
from tests.warm_python import WarmPython

WINDOWS = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))
LOAD = """
import sys, json, torch
from transformers import AutoModelForCausalLM
for folder in json.loads(sys.argv[1]):
    ids = torch.load(folder + "/ids.pt")
    for name in ("logits", "kernel"):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", attn_implementation="eager", output_loading_info=True
        )
        assert not any(info.values()), info
        for part in model.eval().modules():
            if name == "logits" and type(part).__name__ == "Linear4bit":
                part.support_avx512bf16_for_cpu = False  # else whatever kernel this processor has
        with torch.no_grad():
            torch.save(model(ids).logits, f"{folder}/{name}.pt")
            model.generate(ids[:1, :6], max_new_tokens=4, do_sample=False)
print("llmcompress" in sys.modules)
"""
NO_INNER = {"llama_gqa": "*.down_proj", "gpt2": "*.mlp.c_proj", "opt": "*.fc2", "qwen3": "*.down_proj"}
"""96 inputs: not blocks of 64."""


def apply(family: str, passes: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = tiny_model(family, seed=1)
    recipe = parse_recipe(f"passes: {passes}", "test")
    return apply_passes(
        model,
        map_model(model),
        recipe.passes,
        RunContext(WINDOWS, batch=4, storage_dtype=dtype, **options),
    )


CASES = {
    f"{family} {name} {str(dtype)[6:]}": (family, f"[{{{name}: {{exclude: '{NO_INNER[family]}'}}}}]", dtype)
    for family in ("llama_gqa", "gpt2", "opt")
    for name, dtype in (("bnb_nf4", torch.float32), ("bnb_nf4", torch.bfloat16), ("bnb_int8", torch.bfloat16))
}
CASES |= {
    "some blocks": ("qwen3", "[{bnb_nf4: {sites: '*.1.self_attn.q_proj'}}]", torch.float32),
    "every linear": ("llama_odd", "[{bnb_int8: {}}]", torch.float32),
    "after pruning": ("llama_gqa", "[{wanda: {sparsity: 0.5}}, {bnb_int8: {}}]", torch.float32),
    "narrower": ("llama_gqa", "[{width: {fraction: 0.33, round_to: 64, heads: false}}, {bnb_nf4: {}}]", torch.float32),
    "experts stay": ("qwen3_moe", "[{bnb_int8: {exclude: '*.mlp.*'}}]", torch.float32),
}
if transformers.__version__.startswith("5."):
    CASES["experts stay"] = ("qwen3_moe", "[{bnb_int8: {}}]", torch.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, stock_python: WarmPython) -> dict[str, Path]:
    root, folders = tmp_path_factory.mktemp("bnb"), {}
    for number, (name, (family, passes, dtype)) in enumerate(CASES.items()):
        model, folder = apply(family, passes, dtype).model, root / str(number)
        result = save_model(model, folder, "auto", storage_dtype=dtype, max_shard_size="5GB")
        assert result.format == "bitsandbytes"
        ids = tiny_tokens(family)
        torch.save(ids, folder / "ids.pt")
        for parameter in model.parameters():  # loaders keep rotary tables in float32
            parameter.data = parameter.data.to(dtype)
        with torch.no_grad():
            torch.save(model(ids).logits, root / f"{number}.pt")
        folders[name] = folder
    jobs = [str(folder) for folder in folders.values()]
    done = stock_python.run(LOAD, json.dumps(jobs))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "False"
    return folders


@pytest.mark.parametrize("kind", ["bnb_nf4", "bnb_int8"])
def test_the_footprint_of_a_folder_is_that_of_the_model(kind: str, tmp_path: Path) -> None:
    model = apply("llama_gqa", f"[{{wanda: {{sparsity: 0.3}}}}, {{{kind}: {{exclude: '*.down_proj'}}}}]").model
    save_model(model, tmp_path / "out", "auto", storage_dtype=torch.float32, max_shard_size="5GB")
    found = footprint(tmp_path / "out")
    coded = [part for part in model.modules() if isinstance(part, BnbLinear)]
    weights = sum(part.out_features * part.in_features for part in coded)
    dense = [parameter for name, parameter in model.named_parameters(remove_duplicate=True)]
    assert found.codes == weights and found.parameters == weights + sum(each.numel() for each in dense)
    there = sum(int(part.dense_weight().count_nonzero()) for part in coded)
    assert found.nonzero == there + sum(int(each.count_nonzero()) for each in dense)
    scales = sum(part.absmax.numel() for part in coded) * (8 if kind == "bnb_nf4" else 32)
    bits = weights * (4 if kind == "bnb_nf4" else 8) + scales + sum(32 * each.numel() for each in dense)
    if kind == "bnb_nf4":
        bits += sum(32 * (part.nested_absmax.numel() + 1) for part in coded)
    assert found.format == "bitsandbytes" and found.ideal_bytes == bits // 8


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_without_us_computes_the_same_logits(saved: dict[str, Path], name: str) -> None:
    folder = saved[name]
    ours, theirs = torch.load(folder.with_suffix(".pt")), torch.load(folder / "logits.pt")
    assert torch.equal(theirs, ours)
    # where bitsandbytes has a kernel of its own for 4 bits it computes in bfloat16
    kernel = torch.load(folder / "kernel.pt")
    assert (kernel - ours).float().abs().median() < 0.01 * ours.float().abs().max()


@pytest.mark.parametrize("name", ["bnb_nf4", "bnb_int8"])
def test_codes_are_those_that_transformers_makes_itself(tmp_path: Path, name: str) -> None:
    tiny_model("llama_gqa", seed=1).save_pretrained(tmp_path / "dense")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} if name == "bnb_nf4" else {}
    config = BitsAndBytesConfig(load_in_4bit=name == "bnb_nf4", load_in_8bit=name == "bnb_int8", **options)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.float32)
    theirs = stock.state_dict()
    model = apply("llama_gqa", f"[{{{name}: {{exclude: '*.down_proj'}}}}]").model
    sites = {key: part for key, part in model.named_modules() if isinstance(part, BnbLinear)}
    assert len(sites) == 18
    for key, part in sites.items():
        for leaf, tensor in part.tensors_on_disk().items():
            assert torch.equal(tensor, theirs[f"{key}.{leaf}"]), (key, leaf)


@pytest.mark.parametrize("name", ["bnb_nf4", "bnb_int8"])
@torch.no_grad()
def test_zeros_stay_zero_and_the_dense_form_is_what_is_computed(name: str) -> None:
    model = apply("llama_gqa", f"[{{wanda: {{sparsity: 0.5}}}}, {{{name}: {{exclude: '*.down_proj'}}}}]").model
    for part in model.modules():
        if isinstance(part, BnbLinear):
            weight_OI = part.dense_weight()
            assert (weight_OI == 0).float().mean() >= 0.5
            x = torch.randn(3, part.in_features)
            torch.testing.assert_close(part(x), x @ weight_OI.T, atol=0.03, rtol=0.03)


def test_a_missing_package_is_refused_before_any_work_with_the_command_that_installs_it(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(CompressError) as refused:
        PASSES["bnb_nf4"]().check_packages()
    assert refused.value.fix == 'pip install "llmcompress[bnb]"' and refused.value.exit_code == ExitCode.REFUSED


def test_sites_that_some_loader_cannot_read_are_refused_with_the_way_out() -> None:
    with pytest.raises(CompressError, match=r"bnb\.site") as refused:
        apply("llama_gqa", "[{bnb_nf4: {}}]")
    assert "down_proj" in refused.value.fix
    with pytest.raises(CompressError, match=r"bnb\.site"):
        apply("falcon", "[{bnb_int8: {}}]")
    if transformers.__version__.startswith("4."):
        with pytest.raises(CompressError, match="banks"):
            apply("qwen3_moe", "[{bnb_int8: {}}]")


@pytest.mark.parametrize(
    ("passes", "code"),
    [
        ("[{svd: {fraction: 0.2}}, {bnb_nf4: {}}]", "recipe.order"),
        ("[{rtn: {scheme: int4_g32}}, {bnb_nf4: {}}]", "recipe.order"),
        ("[{bnb_nf4: {}}, {gptq: {scheme: int4_g32}}]", "recipe.order"),
    ],
)
def test_passes_that_leave_or_need_other_weights_are_refused(passes: str, code: str) -> None:
    with pytest.raises(CompressError) as refused:
        parse_recipe(f"passes: {passes}", "test")
    assert refused.value.code == code


def test_mixtures_are_more_than_its_own_format_can_say(tmp_path: Path) -> None:
    both = "[{bnb_nf4: {sites: '*.self_attn.*'}}, {bnb_int8: {sites: '*.mlp.*'}}]"
    model, ids = apply("llama_gqa", both).model, tiny_tokens("llama_gqa")
    saved = save_model(model, tmp_path, "auto", storage_dtype=torch.float32)
    assert saved.format == "llmcompress"
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_plain_multiplies_nf4_out_and_refuses_int8(tmp_path: Path) -> None:
    options: Any = {"storage_dtype": torch.float32, "max_shard_size": "5GB"}
    model = apply("gpt2", "[{bnb_nf4: {exclude: '*.mlp.c_proj'}}]").model
    save_model(model, tmp_path / "plain", "plain", **options)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32, attn_implementation="eager")
    ids = tiny_tokens("gpt2")
    with torch.no_grad():
        torch.testing.assert_close(stock.eval()(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(CompressError, match="activations"):
        save_model(apply("gpt2", "[{bnb_int8: {}}]").model, tmp_path / "no", "plain", **options)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def run() -> Any:
        with Run.open(tmp_path / "out", fingerprint={}, lock_text="", fresh=False) as kept:
            return apply("llama_gqa", "[{bnb_nf4: {exclude: '*.down_proj'}}]", keep=kept)

    first, again = run(), run()
    assert again.rows == first.rows and len(first.rows) == 18
    with torch.no_grad():
        assert torch.equal(again.model(WINDOWS).logits, first.model(WINDOWS).logits)


def test_rows_tell_the_bits_that_lie_on_disk(tmp_path: Path) -> None:
    for name, exact in (("bnb_nf4", 4 + 8 / 64 + 32 / 64 / 256), ("bnb_int8", 8 + 32 / 64)):
        rows = apply("qwen3", f"[{{{name}: {{sites: '*.q_proj'}}}}]").rows
        assert [row.bits_per_weight for row in rows] == [pytest.approx(exact)] * tiny_config("qwen3").num_hidden_layers
