"""A plan foretells the run: exact bytes, every problem at once, and no weight is read for it."""

from __future__ import annotations

import builtins
import io
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig, PreTrainedTokenizerFast

from llmcompress.cost import Machine
from llmcompress.errors import CompressError, ExitCode
from llmcompress.exporters.save import save_model
from llmcompress.known_model import known_in_memory, known_model
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import Source, find_source
from llmcompress.model.probe import probe
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.ranges import fit
from llmcompress.passes.base import PASSES
from llmcompress.passes.quantization.awq import AWQ
from llmcompress.passes.quantization.gptq import GPTQ
from llmcompress.passes.quantization.rtn import RoundToNearest
from llmcompress.passes.quantization.smoothquant import SmoothQuant
from llmcompress.passes.schemes import resolve_scheme, site_schemes
from llmcompress.pipeline import compress
from llmcompress.planning import Plan, make_plan, with_weights_placed, within_target_limits
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe
from llmcompress.recipe.model import Recipe, Save
from tests.families import tiny_model
from tests.tiny_folder import tiny_tokenizer, write_tiny_llama

SCHEMES = [
    "int2_g16",
    "int3_g16",
    "int4_g16",
    "int4_g16_asym",
    "int8_channel",
    "int8_g16_asym",
    "int8_channel_a8token",
    "int8_channel_asym_a8token",
    "int8_channel_a8tensor",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """48 inputs of down_proj divide by 16 and not by 32."""
    return Source(write_tiny_llama(tmp_path_factory.mktemp("tiny")), "tiny")


def quantized(source: Source, plan: Plan) -> nn.Module:
    """The model with every planned site rounded to nearest."""
    loaded = load_for_compression(source)
    for row in plan.sites:
        if row.scheme:
            parent, _, leaf = row.site.rpartition(".")
            linear = loaded.model.get_submodule(row.site)
            scheme = named_scheme(row.scheme)
            fitted = fit(linear.weight.detach(), scheme.weights, scale_dtype=torch.bfloat16)
            codes = round_to_codes(linear.weight.detach(), fitted)
            scale = torch.ones(1) if scheme.activations == "tensor" else None
            module = QuantLinear.from_fitted(scheme, codes, fitted, linear.bias, scale)
            setattr(loaded.model.get_submodule(parent), leaf, module)
    return loaded.model


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_output_bytes_are_those_of_the_saved_file(tiny, tmp_path, scheme):
    plan = make_plan(tiny, Recipe(passes=(RoundToNearest(scheme=scheme),)))
    save_model(quantized(tiny, plan), tmp_path, "auto", storage_dtype=torch.bfloat16, max_shard_size="5GB")
    assert plan.output_bytes == size_of(tmp_path)
    assert plan.bytes_dense == size_of(tiny.folder)


def test_output_bytes_of_the_bundled_model_are_those_of_the_saved_file(tmp_path):
    source = find_source("builtin:books-llama")
    plan = make_plan(source, Recipe(passes=(RoundToNearest(scheme="int4_g32"),)))
    save_model(quantized(source, plan), tmp_path, "auto", storage_dtype=torch.bfloat16, max_shard_size="5GB")
    assert plan.output_bytes == size_of(tmp_path)
    assert plan.output_bytes < plan.bytes_dense


@pytest.mark.parametrize(("dtype", "expected"), [("checkpoint", torch.bfloat16), ("float32", torch.float32)])
def test_output_bytes_of_a_plain_folder_are_those_of_the_saved_file(tiny, tmp_path, dtype, expected):
    plan = make_plan(tiny, Recipe(passes=(RoundToNearest(scheme="int4_g16"),), save=Save(format="plain", dtype=dtype)))
    save_model(quantized(tiny, plan), tmp_path, "plain", storage_dtype=expected, max_shard_size="5GB")
    assert plan.output_bytes == size_of(tmp_path)


@pytest.mark.parametrize("scheme", ["int3_g16", "int4_g16_asym", "int8_channel"])
def test_output_bytes_of_codes_at_their_own_width_are_those_of_the_saved_file(tiny, tmp_path, scheme):
    recipe = Recipe(passes=(RoundToNearest(scheme=scheme),), save=Save(format="llmcompress"))
    plan = make_plan(tiny, recipe)
    live = quantized(tiny, plan)
    save_model(live, tmp_path, "llmcompress", storage_dtype=torch.bfloat16, max_shard_size="5GB")
    assert plan.output_bytes == size_of(tmp_path)


def test_site_bytes_add_up_with_the_rest(tiny):
    plan = make_plan(tiny, Recipe(passes=(RoundToNearest(scheme="int4_g16", exclude=("*.down_proj",)),)))
    rows = {row.site: row for row in plan.sites}
    up, down = rows["model.layers.0.mlp.up_proj"], rows["model.layers.0.mlp.down_proj"]
    assert up.scheme == "int4_g16" and up.passes == ("rtn",)
    assert up.bytes == 48 * 32 // 2 + 48 * 2 * 2 + 16
    assert up.bits_per_weight == pytest.approx(4 + 16 / 16 + 128 / (48 * 32))
    assert down.scheme is None and down.passes == () and down.bytes == 48 * 32 * 2 and down.bits_per_weight == 16


def test_conv1d_sites_are_planned_as_ordinary_weights(tmp_path):
    tokenizer = write_tiny_llama(tmp_path / "llama")
    config: PretrainedConfig = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=288, n_positions=32)
    folder = tmp_path / "gpt2"
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    plan = make_plan(Source(folder, "gpt2"), Recipe(passes=(RoundToNearest(scheme="int4_g16"),)))
    assert plan.output_bytes == pytest.approx(size_of(folder), rel=0.01)
    assert any("dequantized" in warning for warning in plan.warnings)


# A17: inputs that do not divide


def test_a17_all_indivisible_sites_are_listed_with_every_way_out(tiny):
    with pytest.raises(CompressError) as caught:
        make_plan(tiny, Recipe(passes=(RoundToNearest(scheme="int4_g32"),)))
    error = caught.value
    assert error.code == "scheme.indivisible" and error.exit_code is ExitCode.USAGE
    assert error.where == "model.layers.*.mlp.down_proj: 48 inputs, int4_g32 (2 sites)"
    for way in ("int4_channel", '"*.down_proj"', "on_indivisible: fit|skip|channel|pad"):
        assert way in error.fix


@pytest.mark.parametrize(
    ("choice", "scheme"), [("skip", None), ("channel", "int4_channel"), ("pad", "int4_g32"), ("fit", "int4_channel")]
)
def test_a17_on_indivisible_decides(tiny, choice, scheme):
    plan = make_plan(tiny, Recipe(passes=(RoundToNearest(scheme="int4_g32", on_indivisible=choice),)))
    by_kind = {row.site.rpartition(".")[2]: row.scheme for row in plan.sites}
    assert by_kind["down_proj"] == scheme
    assert by_kind["q_proj"] == "int4_g32"


def test_a17_an_override_can_be_the_way_out(tiny):
    rtn = RoundToNearest(scheme="int4_g32", overrides={"*.down_proj": {"scheme": "int8_channel"}})
    plan = make_plan(tiny, Recipe(passes=(rtn,)))
    assert {row.scheme for row in plan.sites} == {"int4_g32", "int8_channel"}


def test_a17_a_pass_that_only_scales_is_checked_too_and_makes_no_codes(tiny):
    model_map = probe(load_for_compression(tiny).preflight.config)
    assert site_schemes([AWQ(round=False, scheme="int4_g16")], model_map) == {}
    with pytest.raises(CompressError, match="down_proj"):
        site_schemes([AWQ(round=False, scheme="int4_g32")], model_map)


@pytest.mark.parametrize(
    ("inputs", "group", "smaller"), [(11008, 128, None), (576, 128, "g64"), (100, 64, "channel"), (172, 32, "channel")]
)
def test_the_group_proposed_divides(inputs, group, smaller):
    rtn = RoundToNearest(scheme=f"int4_g{group}")
    if inputs % group == 0:
        assert resolve_scheme(rtn, "site", inputs) == named_scheme(f"int4_g{group}")
        return
    with pytest.raises(CompressError) as caught:
        resolve_scheme(rtn, "site", inputs)
    assert f"int4_{smaller}" in caught.value.fix


# The rest of the plan


def test_no_weight_is_read(tiny, tmp_path):
    """Every weight of the file is garbage, and the plan is the same."""
    folder = shutil.copytree(tiny.folder, tmp_path / "garbage")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:start] + b"\xff" * (len(content) - start))
    recipe = Recipe(passes=(GPTQ(scheme="int4_g16"),))
    ours, theirs = make_plan(Source(folder, "tiny"), recipe), make_plan(tiny, recipe)
    same = {"sites", "output_bytes", "bytes_dense", "refused", "warnings"}
    assert ours.model_dump(include=same) == theirs.model_dump(include=same)


@pytest.mark.parametrize(
    ("format", "export", "kept"),
    [
        ("llmcompress", "[]", False),
        ("auto", "[]", True),
        ("auto", "[onnx_genai]", False),
        ("auto", "[onnx_genai, plain]", True),
        ("llmcompress", "[plain]", True),
    ],
)
def test_a_table_is_rounded_where_every_named_target_holds_it(tiny, format, export, kept):
    passes = "[rtn: {scheme: int4_g16}, embeddings: {required: false}]"
    text = f"passes: {passes}\nsave: {{format: {format}}}\nexport: {export}\nevaluate: {{}}"
    limited = within_target_limits(parse_recipe(text, "t"))
    assert [PASSES.name_of(type(each)) for each in limited.passes] == (["rtn"] if kept else ["rtn", "embeddings"])
    if export == "[]":
        assert ("model.embed_tokens" in make_plan(tiny, limited).refused) == kept


def test_the_time_of_evaluation_is_foretold_and_bounded(tiny, tmp_path):
    machine = Machine(operations_per_second=1e9, process_bytes=0)
    text = tmp_path / "long.txt"
    text.write_text("a word and another\n" * 50_000)

    def seconds(**task):
        evaluated = {"perplexity": [{"source": str(text), **task}]}
        recipe = Recipe(passes=(RoundToNearest(scheme="int4_g16"),), evaluate=evaluated)
        return make_plan(tiny, recipe, machine=machine).evaluation_seconds

    assert 0 < seconds(max_windows=4) < seconds() < seconds(max_windows="all")


@pytest.mark.parametrize("tied", [True, False])
def test_output_bytes_of_rounded_tables_are_those_of_the_saved_file(tmp_path, tied):
    source = Source(write_tiny_llama(tmp_path / "model", tie_word_embeddings=tied), "tiny")
    recipe = Recipe(
        passes=(RoundToNearest(scheme="int4_g16"), PASSES["embeddings"]()),
        save=Save(format="llmcompress"),
        evaluate={"perplexity": []},
    )
    plan = make_plan(source, recipe)
    compress(str(source.folder), recipe, tmp_path / "out")
    assert plan.output_bytes == pytest.approx(size_of(tmp_path / "out"), rel=0.005)  # but for one name in the header


def test_output_bytes_of_a_sliced_model_count_the_head_that_is_no_longer_tied(tmp_path):
    source = Source(write_tiny_llama(tmp_path / "model", tie_word_embeddings=True), "tiny")
    sizes = {"source": "self", "samples": 4, "tokens": 32}
    recipe = Recipe(passes=(PASSES["slicegpt"](),), calibration=sizes, evaluate={"perplexity": []})
    plan = make_plan(source, recipe)
    compress(str(source.folder), recipe, tmp_path / "out")
    assert plan.output_bytes == pytest.approx(size_of(tmp_path / "out"), rel=0.02)
    assert any("grow by" in note for note in plan.warnings if note.startswith("slicegpt"))


@pytest.mark.parametrize(
    "passes",
    [
        "[{caldera: {scheme: int3_g16, rank: 4, factor_scheme: int8_channel}}]",
        "[{caldera: {scheme: int3_g16, rank: 0}}]",
        "[{caldera: {scheme: int3_g16, rank: 0, overrides: {'*.down_proj': {rank: 4}}}}]",
        "[{low_rank_correction: {quantizer: {rtn: {scheme: int3_g16}}, rank: 4}}]",
        "[{svd: {fraction: 0.5, round_to: 32}}, {rtn: {scheme: int3_g32}}]",
        "[{rtn: {scheme: int4_channel_a8token}}, {kv_cache: {dtype: int8}}]",
        "[{rotation: {online: true}}, {rtn: {scheme: int4_channel_a8token}}]",
        "[{rotation: {}}]",
    ],
)
def test_output_bytes_count_branches_untied_heads_and_formats_that_only_we_load(tmp_path, passes):
    """Within a hundredth: names of parts and single numbers are not planned."""
    recipe = parse_recipe(
        f"model: builtin:books-llama\ncalibration: {{samples: 2, tokens: 64}}\npasses: {passes}\nevaluate: {{}}", "test"
    )
    plan = make_plan(find_source("builtin:books-llama"), recipe)
    compress("builtin:books-llama", recipe, tmp_path / "out")
    assert plan.output_bytes == pytest.approx(size_of(tmp_path / "out"), rel=0.01)


def test_factors_in_a_stock_format_are_refused_before_the_work():
    passes = "passes: [{svd: {fraction: 0.2}}, {rtn: {scheme: int4_channel}}]"
    recipe = parse_recipe(f"{passes}\nsave: {{format: compressed-tensors}}\nevaluate: {{}}", "test")
    with pytest.raises(CompressError, match="not svd"):
        make_plan(find_source("builtin:books-llama"), recipe)


@pytest.mark.parametrize("save", ["auto", "llmcompress"])
def test_an_optional_table_is_rounded_where_the_target_holds_it(tiny, save):
    optional = PASSES["embeddings"](required=False)
    recipe = Recipe(passes=(RoundToNearest(scheme="int4_g16"), optional), save=Save(format=save))
    assert (optional in within_target_limits(recipe).passes) == (save == "llmcompress")
    assert optional not in with_weights_placed(recipe, "always", weight_bytes=1)[0].passes


def test_passes_are_named_in_order_and_refused_parts_with_reasons(tiny):
    plan = make_plan(tiny, Recipe(passes=(SmoothQuant(), GPTQ(scheme="int8_channel_a8token"))))
    assert {row.passes for row in plan.sites} == {("smoothquant", "gptq")}
    assert "lm_head" in plan.refused and "model.embed_tokens" in plan.refused
    assert plan.model == "tiny" and plan.family == "llama"


def test_more_calibration_costs_more_memory_and_time(tiny):
    gptq = GPTQ(scheme="int4_g16")
    small, large = (
        make_plan(
            tiny, Recipe(passes=(gptq,), calibration={"samples": samples, "tokens": 4096}, evaluate={"perplexity": []})
        )
        for samples in (4, 4096)
    )
    hidden = 2 * 4 * 4092 * 4096 * 32
    assert large.peak_memory_bytes - small.peak_memory_bytes == pytest.approx(hidden, rel=0.2)
    assert large.operations > small.operations > 0
    assert large.estimated_seconds is None


def test_gradients_through_the_whole_model_are_foretold(tiny):
    """What one batch computes, logits above all; and of a second-order score the copies of all weights."""

    def peak(each, batch=8):
        settings = {"samples": 8, "tokens": 4096, "batch": batch}
        return make_plan(
            tiny, Recipe(passes=(each,), calibration=settings, evaluate={"perplexity": []})
        ).peak_memory_bytes

    uniform, by_loss = (PASSES["svd"](ranks=ranks) for ranks in ("uniform", "loss"))
    vocabulary = AutoModelForCausalLM.from_pretrained(tiny.folder).config.vocab_size
    assert peak(by_loss) - peak(uniform) > 4 * 8 * 4096 * 3 * vocabulary
    assert peak(by_loss) > peak(by_loss, batch=1)
    first, second = (PASSES["width"](score=f"taylor_{order}") for order in ("first", "second"))
    more_at_once, window_by_window = (peak(each, batch=8) - peak(each, batch=1) for each in (first, second))
    assert window_by_window < more_at_once / 2


def test_the_time_of_a_training_grows_with_its_steps(tiny):
    machine = Machine(operations_per_second=1e9, process_bytes=1000)

    def seconds(steps):
        each = PASSES["recover"](training={"steps": steps})
        settings = {"samples": 8, "tokens": 512}
        return make_plan(tiny, Recipe(passes=(each,), calibration=settings), machine=machine).estimated_seconds

    assert seconds(10_000) > 20 * seconds(100) > 0


def test_a_recipe_whose_globs_match_nothing_is_refused(tiny):
    with pytest.raises(CompressError, match="no-such-site"):
        make_plan(tiny, Recipe(passes=(RoundToNearest(scheme="int4_g16", sites=("*.dwon_proj",)),)))


def test_a_plan_is_plain_data(tiny):
    plan = make_plan(tiny, Recipe(passes=(RoundToNearest(scheme="int4_g16"),)))
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_plans_for_a_known_model_are_those_for_its_folder_and_open_no_file(tiny, monkeypatch):
    recipe = Recipe(passes=(GPTQ(scheme="int4_g16"),))
    known, direct = known_model(tiny), make_plan(tiny, recipe, offload="never")  # auto looks at the free memory

    def refuse(*args, **options):
        raise AssertionError(f"a file was opened: {args}")

    for module, name in ((builtins, "open"), (io, "open"), (os, "open"), (Path, "open")):
        monkeypatch.setattr(module, name, refuse)
    again = make_plan(known, recipe, offload="never")
    monkeypatch.undo()
    assert again == direct


@pytest.mark.parametrize("passes", ["{slicegpt: {fraction: 0.25}}", "{rotation: {}}"])
@pytest.mark.parametrize(("family", "why"), [("gemma2", "scales individual channels"), ("olmo2", "post-norm")])
def test_a_stream_that_cannot_be_rotated_is_refused_before_any_work(family: str, why: str, passes: str) -> None:
    recipe = parse_recipe(f"passes: [{passes}, {{rtn: {{}}}}]\nevaluate: {{perplexity: []}}", "test")
    model = tiny_model(family)
    with pytest.raises(CompressError, match=why):
        make_plan(known_in_memory(model), recipe)
    progress = Stages()
    with pytest.raises(CompressError, match=why):
        compress(model, recipe, tokenizer=PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer()), progress=progress)
    assert progress.begun == ["load"]
    assert make_plan(known_in_memory(tiny_model("bloom")), recipe).sites


class Stages(Silent):
    """Which stages began."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.begun.append(name)
