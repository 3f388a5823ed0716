"""What `recover` trains: DoRA, adapters merged into codes, norms and scales alone, low-rank factors in turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.modules.bnb_linear import BnbLinear
from llmcompress.modules.corrected import CorrectedLinear
from llmcompress.modules.low_rank import LowRankLinear
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES, Pass
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe
from llmcompress.recipe.order import check_order
from llmcompress.training.adapters import adapted
from tests.families import tiny_model
from tests.passes.decomposition.factored import map_of, windows
from tests.passes.quantization.test_gsq import quantized

TRAINING = {"steps": 6, "batch": 4, "learning_rate": 3e-3}


class Noting(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.titles: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        title = text.partition(": step")[0]
        if title not in self.titles:
            self.titles.append(title)


def make(name: str, **options: Any) -> Pass:
    padded = {"on_indivisible": "pad"} if "on_indivisible" in PASSES[name].model_fields else {}
    return PASSES[name](**padded, **options)


def recover(**options: Any) -> Pass:
    return PASSES["recover"](**{"training": TRAINING, **options})


def compressed(
    *passes: Pass, family: str = "llama_gqa", progress: Silent | None = None
) -> tuple[PreTrainedModel, list[Any]]:
    model = tiny_model(family, seed=1)
    context = RunContext(windows(), batch=4, progress=progress or Silent())
    return apply_passes(model, map_of(family), passes, context)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    now = after.state_dict()
    return {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, now[name])}


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2"])
def test_dora_is_the_papers_formula_and_begins_at_the_very_weight(family: str) -> None:
    model = tiny_model(family, seed=1)
    sites = WholeModel(model, map_of(family), RunContext(windows(), batch=4)).sites()
    site = sites[1]
    weight_OI, expected = site.weight_OI, model(windows()).logits
    with adapted([site], rank=3, scale=2.0, seed=0, dora=True) as (left, right, length), torch.no_grad():
        assert torch.equal(model(windows()).logits, expected)
        left.normal_()
        length.mul_(1.5)
        added = 2 * left @ right
    sum_OI = weight_OI + (added.T if site.info.transposed else added)
    wanted_OI = 1.5 * weight_OI.norm(dim=1, keepdim=True) * sum_OI / sum_OI.norm(dim=1, keepdim=True)
    torch.testing.assert_close(site.weight_OI, wanted_OI)


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2"])
def test_a_dense_linear_has_its_adapter_beside_it_and_is_merged_at_the_end(family: str) -> None:
    model = tiny_model(family, seed=1)
    site = WholeModel(model, map_of(family), RunContext(windows(), batch=4)).sites()[1]
    module, weight_OI, expected = site.module, site.weight_OI, model(windows()).logits
    with adapted([site], rank=3, scale=2.0, seed=0) as (left, right):
        assert isinstance(site.module, CorrectedLinear) == (family != "gpt2"), "there it is part of the weight"
        assert torch.equal(model(windows()).logits, expected)
        with torch.no_grad():
            left.normal_()
        apart, added = model(windows()).logits, (2 * left @ right).detach()
    assert site.module is module and not torch.equal(apart, expected)
    torch.testing.assert_close(site.weight_OI, weight_OI + (added.T if site.info.transposed else added))
    torch.testing.assert_close(model(windows()).logits, apart)


@pytest.mark.parametrize(("share", "ours", "stays"), [(0.005, False, False), (0.005, True, True), (0.2, False, True)])
def test_single_zeros_of_a_checkpoint_are_no_mask(share: float, ours: bool, stays: bool) -> None:
    model = tiny_model("llama_gqa", seed=1)
    whole = WholeModel(model, map_of("llama_gqa"), RunContext(windows(), batch=4, zeros_are_masks=ours))
    site = whole.sites()[1]
    zero_OI = torch.rand(site.weight_OI.shape, generator=torch.Generator().manual_seed(0)) < share
    site.write(site.weight_OI.masked_fill(zero_OI, 0.0))
    with adapted([site], rank=3, scale=2.0, seed=0) as (left, _), torch.no_grad():
        left.normal_()
    assert torch.equal(site.weight_OI == 0, zero_OI) == stays


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2"])
def test_merged_dora_leaves_every_zero(family: str) -> None:
    sparse = make("magnitude", sparsity=0.5)
    before, _ = compressed(sparse, family=family)
    after, rows = compressed(sparse, recover(rank=2, dora=True), family=family)
    for name in (row.site for row in rows if row.algorithm == "recover"):
        was, now = (model.get_submodule(name).weight for model in (before, after))
        assert torch.equal(was == 0, now == 0) and not torch.equal(was, now)


@pytest.mark.parametrize("scheme", ["int3_g32_asym", "int8_channel_a8token"])
def test_merged_and_rounded_again_the_model_is_quantized_as_before_and_the_cost_is_told(scheme: str) -> None:
    progress, quantizer = Noting(), make("rtn", scheme=scheme)
    before, _ = compressed(quantizer)
    training = {**TRAINING, "learning_rate": 0.03}  # what is less than half a step would be lost
    after, rows = compressed(quantizer, recover(rank=4, merge="requantize", training=training), progress=progress)
    assert not any(isinstance(each, CorrectedLinear) for each in after.modules())
    schemes = {name: each.scheme for name, each in quantized(before).items()}
    assert {name: each.scheme for name, each in quantized(after).items()} == schemes
    assert any(name.endswith("codes_OI") for name in changed(before, after))
    (told,) = [note for note in progress.notes if "merged and rounded again" in note]
    first, apart, merged = (float(word) for word in told.split() if word.replace(".", "", 1).isdigit() and "." in word)
    assert apart < first and all(row.rank is None for row in rows)
    degraded = {bool(row.degraded) for row in rows if row.algorithm == "recover"}
    assert degraded == {merged > first}


def test_nf4_is_encoded_by_its_own_package_again() -> None:
    after, _ = compressed(make("bnb_nf4", exclude="*.down_proj"), recover(rank=4, merge="requantize"))
    assert any(isinstance(each, BnbLinear) for each in after.modules())
    assert not any(isinstance(each, CorrectedLinear) for each in after.modules())


def test_a_branch_on_a_branch_cannot_be_merged_into_codes() -> None:
    branched = make("low_rank_correction", quantizer={"rtn": {"scheme": "int3_g32"}}, rank=2)
    with pytest.raises(CompressError, match="a corrected cannot be rounded again"):
        compressed(branched, recover(rank=2, merge="requantize"))


def test_norms_and_scales_alone_are_trained_and_codes_stay() -> None:
    gptq = make("gptq", scheme="int3_g32")
    (before, _), (after, _) = compressed(gptq), compressed(gptq, recover(train="norms_and_scales"))
    found = changed(before, after)
    assert found and all("norm" in name or name.endswith("scale_OG") for name in found)
    assert {name for name in state(before) if "norm" in name} <= found


def test_on_dense_weights_norms_alone_are_trained() -> None:
    sparse = make("magnitude", sparsity=0.5)
    (before, _), (after, _) = compressed(sparse), compressed(sparse, recover(train="norms_and_scales"))
    assert changed(before, after) == {name for name in state(before) if "norm" in name}


@pytest.mark.parametrize("rank", [None, 2])
def test_left_factors_are_trained_first_and_right_ones_then(rank: int | None) -> None:
    svd, progress = make("svd", fraction=0.5, sites="*.mlp.*"), Noting()
    (before, _), (after, _) = (
        compressed(svd),
        compressed(svd, recover(train="factors_in_turn", rank=rank), progress=progress),
    )
    assert progress.titles[-2:] == ["recover, left factors", "recover, right factors"]
    factors = {
        f"{name}.{side}.weight"
        for name, each in before.named_modules()
        if isinstance(each, LowRankLinear)
        for side in ("left", "right")
    }
    assert changed(before, after) == factors


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dora": True}, "set `rank` too"),
        ({"merge": "requantize"}, "set `rank` too"),
        ({"rank": 2, "train": "norms_and_scales"}, "have no adapters"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        recover(**options)


def test_what_cannot_follow_a_quantizer_is_refused_before_the_work() -> None:
    sites = ["model.layers.0.mlp.down_proj"]
    with pytest.raises(CompressError, match="scale the rows of quantized"):
        check_order(parse_recipe("passes: [gptq, recover: {rank: 4, dora: true}]", "r").passes, sites)
    check_order(parse_recipe("passes: [wanda, gptq, recover: {train: norms_and_scales}]", "r").passes, sites)
    with pytest.raises(CompressError, match="no linear is two factors"):
        compressed(recover(train="factors_in_turn"))
