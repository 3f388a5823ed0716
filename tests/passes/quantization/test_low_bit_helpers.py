"""hqq, scale refinement, bias correction, formats per site and codebooks per channel: what each guarantees."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from llmcompress.errors import CompressError
from llmcompress.modules.codebook_linear import CodebookLinear
from llmcompress.modules.manifest import apply_manifest, changes
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.numerics.grid import output_error
from llmcompress.numerics.statistics import Gram
from tests.families import FAMILIES, tiny_model
from tests.passes.decomposition.factored import block_pass, compressed, logits, map_of, whole_model

PAD = {"on_indivisible": "pad"}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "hqq": {"scheme": "int3_g32_asym", **PAD},
    "scale_refinement": {"scheme": "int2_g32", "quantizer": {"rtn": {}}, **PAD},
    "bias_correction": {"scheme": "int2_g32", "new_biases": True, "quantizer": {"rtn": {}}, **PAD},
    "mixture_of_formats": {"schemes": ("int4_g32", "fp4_g32", "nf4_g32"), "quantizer": {"rtn": PAD}},
    "cmpq": {"bits": 9.0, "widths": (1, 2, 3, 4)},
    "kmeans": {"bits": 3},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_on_every_family_each_site_holds_codes_and_no_error_grows(family: str, name: str) -> None:
    model, rows = compressed(family, block_pass(name, **QUANTIZERS[name]))
    assert {row.site for row in rows} == set(map_of(family).site_names())
    kind = CodebookLinear if name in ("cmpq", "kmeans") else QuantLinear
    for row in rows:
        assert isinstance(model.get_submodule(row.site), kind), row
        if row.error is not None and row.error_before is not None:
            assert row.error <= row.error_before * (1 + 1e-6), row
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_runs_repeat_and_bfloat16_values_survive_storage(name: str) -> None:
    each = block_pass(name, **QUANTIZERS[name])
    (model, rows), (again, rows_again) = (compressed("opt", each, dtype=torch.bfloat16) for _ in range(2))
    assert rows == rows_again and torch.equal(logits(model), logits(again))
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and ".layers." in key:
            assert torch.equal(tensor, tensor.bfloat16().float()), key


@pytest.mark.parametrize("name", ["scale_refinement", "bias_correction"])
@pytest.mark.parametrize("inside", ["rtn", "gptq", "hqq"])
def test_errors_told_are_those_of_the_layer_on_calibration_inputs(name: str, inside: str) -> None:
    """Against the outputs themselves, in the first group of sites, whose inputs nothing has changed yet."""
    first = map_of("opt").blocks[0]
    site_name = first.full(first.structure.groups[0].sites[0])
    options = {"new_biases": True} if name == "bias_correction" else {}
    each = block_pass(name, scheme="int2_g32", quantizer={inside: {}}, sites=(site_name,), **options)
    whole = whole_model("opt")
    dense = whole.model.get_submodule(site_name)
    weight, bias = dense.weight.detach().clone(), dense.bias.detach().clone()
    inputs: list[torch.Tensor] = []
    handle = dense.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, args[0].shape[-1])))
    whole.model(input_ids=whole.context.windows_NT)
    handle.remove()
    x = torch.cat(inputs).detach()
    wanted = functional.linear(x, weight, bias)
    model, (row,) = compressed("opt", each)
    (_, (plain_row,)) = compressed("opt", block_pass(inside, scheme="int2_g32", sites=(site_name,)))
    got = model.get_submodule(site_name)(x)
    signal = functional.linear(x, weight).square().sum()
    assert row.error == pytest.approx(float((got - wanted).square().sum() / signal), rel=1e-3)
    assert row.error < row.error_before
    if plain_row.error is not None:
        assert row.error_before == pytest.approx(plain_row.error, rel=1e-4)


def test_after_bias_correction_the_mean_output_is_that_of_the_dense_layer() -> None:
    first = map_of("opt").blocks[0]
    name = first.full(first.structure.groups[0].sites[0])
    whole = whole_model("opt")
    corrected = block_pass("bias_correction", scheme="int2_g32", quantizer={"rtn": {}}, sites=(name,))
    means = []
    for model in (whole.model, compressed("opt", corrected)[0]):
        outputs: list[torch.Tensor] = []

        def keep(_: Any, __: Any, output: torch.Tensor, to: list[torch.Tensor] = outputs) -> None:
            to.append(output.reshape(-1, output.shape[-1]))

        handle = model.get_submodule(name).register_forward_hook(keep)
        whole.model = model
        with torch.no_grad():
            whole.model(input_ids=whole.context.windows_NT)
        handle.remove()
        means.append(torch.cat(outputs).mean(0))
    torch.testing.assert_close(means[1], means[0], atol=1e-5, rtol=1e-4)


def test_a_linear_without_bias_keeps_none_and_says_so_unless_it_may_get_one() -> None:
    options = {"scheme": "int2_g32", "quantizer": {"rtn": {}}}
    model, rows = compressed("llama", block_pass("bias_correction", **options))
    plain, _ = compressed("llama", block_pass("rtn", scheme="int2_g32"))
    assert all("no bias to correct" in (row.degraded or "") for row in rows)
    assert torch.equal(logits(model), logits(plain))
    model, rows = compressed("llama", block_pass("bias_correction", new_biases=True, **options))
    assert all(row.degraded is None and row.error < row.error_before for row in rows)
    assert changes(model, tiny_model("llama", seed=1)).needs_plugin
    assert not changes(plain, tiny_model("llama", seed=1)).needs_plugin


def test_helpers_stand_inside_each_other_and_each_improves_on_the_one_inside() -> None:
    scheme = {"scheme": "int2_g32"}
    refining = {"scale_refinement": {"quantizer": {"rtn": {}}}}
    _, refined = compressed("opt", block_pass("scale_refinement", quantizer={"rtn": {}}, **scheme))
    _, both = compressed("opt", block_pass("bias_correction", quantizer=refining, **scheme))
    first = map_of("opt").blocks[0].structure.groups[0].sites
    for one, two in zip(refined, both, strict=True):
        assert two.error < two.error_before
        if one.site.endswith(first[0]) and ".0." in one.site:
            assert two.error_before == pytest.approx(one.error, rel=1e-4)


def test_with_float32_scales_refining_reaches_least_squares_in_the_layer_error() -> None:
    """More sweeps change nothing any more."""
    few, many = (
        compressed("llama_gqa", block_pass("scale_refinement", scheme="int3_g32", quantizer={"rtn": {}}, sweeps=n))[1]
        for n in (1, 20)
    )
    for a, b in zip(few, many, strict=True):
        assert a.error == pytest.approx(b.error, rel=2e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("schemes", [("int4_g32", "fp4_g32"), ("int8_channel_a8token", "fp8_channel_a8token")], ids=str)
def test_the_chosen_format_has_the_least_error_of_all(family: str, schemes: tuple[str, ...]) -> None:
    only = {"sites": ("*.0.*",)}
    pick = block_pass("mixture_of_formats", schemes=schemes, quantizer={"rtn": {}}, **only)
    model, rows = compressed(family, pick)
    dense = {site.name: site.weight_OI for site in whole_model(family).sites()}
    pure = [compressed(family, block_pass("rtn", scheme=name, **only))[0] for name in schemes]
    for row in rows:
        module = model.get_submodule(row.site)
        weight = dense[row.site]
        if schemes[0] == "int4_g32":
            lost = [float((each.get_submodule(row.site).weight - weight).square().sum()) for each in pure]
            assert float((module.weight - weight).square().sum()) == pytest.approx(min(lost))
            assert row.scheme == schemes[lost.index(min(lost))]
        else:
            assert row.error is not None and row.error <= row.error_before


def test_candidates_of_different_widths_are_refused() -> None:
    with pytest.raises(ValidationError, match="same bit width"):
        block_pass("mixture_of_formats", schemes=("int4_g32", "int8_g32"))
    with pytest.raises(CompressError, match="do not divide"):
        block_pass("mixture_of_formats", schemes=("int4_g40",)).check(map_of("llama"))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("hqq", {"scheme": "fp4_g32"}, "only integer"),
        ("scale_refinement", {"scheme": "mxfp4"}, "cannot be refined"),
        ("scale_refinement", {"quantizer": {"gptq": {"scheme": "int4_g32"}}}, "next to it"),
        ("bias_correction", {"quantizer": {"awq": {}}}, "use one of"),
        ("cmpq", {"widths": (0, 3)}, "from 1 to 8"),
        ("cmpq", {"widths": ()}, "at least one"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        block_pass(name, **options)


@pytest.mark.parametrize("bits", [5.5, 8.0])
def test_channelwise_bits_are_those_of_the_tensors_and_meet_the_average(bits: float) -> None:
    model, rows = compressed("llama", block_pass("cmpq", bits=bits, widths=(1, 2, 3, 4, 8)), dtype=torch.bfloat16)
    for row in rows:
        module = model.get_submodule(row.site)
        count = module.in_features * module.out_features
        floating = (module.value_N, *(module.get_buffer(f"levels_{width}") for width in module.widths))
        # levels and full weights are float32 in memory and two bytes on disk
        stored = module.coded_bits() - sum(16 * each.numel() for each in floating)
        assert row.bits_per_weight == pytest.approx(stored / count)
        assert row.bits_per_weight <= bits
        if row.site.endswith("o_proj"):
            assert len(set(module.width_I.tolist())) > 1
    sizes = [model.get_submodule(row.site).dense_weight().numel() for row in rows]
    mean = sum(row.bits_per_weight * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes)
    assert mean > bits - 0.2


def test_codebooks_get_more_bits_where_inputs_are_large_and_lose_less_with_more() -> None:
    errors = []
    for bits in (5.0, 6.0, 8.0):
        _, rows = compressed("llama", block_pass("cmpq", bits=bits, sites=("*.0.self_attn.q_proj",)))
        errors.append(rows[0].error)
    assert errors == sorted(errors, reverse=True)


def test_too_few_bits_for_codebooks_leave_a_site_dense_and_say_so() -> None:
    model, rows = compressed("llama", block_pass("cmpq", bits=1.2))
    assert all("kept dense" in (row.degraded or "") for row in rows)
    assert torch.equal(logits(model), logits(tiny_model("llama", seed=1)))


def test_a_codebook_linear_is_built_again_from_its_spec() -> None:
    model, _ = compressed("opt", block_pass("cmpq", bits=9.0, widths=(1, 3, 8)))
    stock = tiny_model("opt", seed=1)
    manifest = changes(model, stock)
    assert manifest.needs_plugin
    apply_manifest(stock, manifest, torch.float32)
    stock.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(stock), logits(model))


def test_output_errors_of_the_gram_matrix_are_what_helpers_minimise() -> None:
    whole = whole_model("llama")
    work = next(iter(whole.stream()))
    work.measure(work.sites, (Gram,))
    site = work.sites[0]
    before = site.weight_OI
    (row,) = block_pass("scale_refinement", scheme="int2_g32", quantizer={"rtn": {}}).apply(work, [site])
    gram = site.statistic(Gram).sum_II
    error = float(output_error(site.weight_OI - before, gram) / output_error(before, gram))
    assert row.error == pytest.approx(error, rel=1e-4)
