"""A compressed model in trainable form: swapped in, trained by the loop, swapped out; and adapters beside codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress import compress, evaluate, load
from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.evaluation.footprint import bytes_on_disk
from llmcompress.modules.base import TrainableTwin
from llmcompress.modules.bnb_linear import BnbLinear
from llmcompress.modules.corrected import CorrectedLinear
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.trainable_roles import ROLES, Role, TrainableRoles
from llmcompress.numerics.loss import next_token_loss
from llmcompress.passes.base import PASSES, Pass
from llmcompress.recipe import parse_recipe
from llmcompress.recipe.order import check_order
from llmcompress.training.adapters import adapted
from llmcompress.training.data.base import Windows
from llmcompress.training.job import Job
from llmcompress.training.loop import train
from llmcompress.training.masks import ZerosStay
from llmcompress.training.settings import Training
from llmcompress.training.trainable_form import trainable_form
from tests.families import FFN, HIDDEN, tiny_tokens
from tests.passes.decomposition.factored import block_pass, compressed, map_of, windows
from tests.tiny_folder import write_tiny_llama

BRIEF = Training(steps=12, batch=4, learning_rate=3e-3)
SITE = "model.layers.0.mlp.down_proj"
GPTQ = {"scheme": "int3_g32", "on_indivisible": "pad"}


def wanted(roles: frozenset[Role] = ROLES, *, keep_zeros: bool = False) -> TrainableRoles:
    return TrainableRoles(roles, keep_zeros=keep_zeros, storage_dtype=torch.float32)


def make(name: str, **options: Any) -> Pass:
    return PASSES[name](**options)


def mixed_model() -> PreTrainedModel:
    """Codes, codes with a branch, factors, dense linears, and an embedding of codes whose table the head shares."""
    model, _ = compressed(
        "llama_gqa",
        block_pass("gptq", **GPTQ, sites="*.mlp.*"),
        block_pass("low_rank_correction", quantizer={"rtn": GPTQ}, rank=3, sites="*.o_proj"),
        block_pass("svd", fraction=0.5, sites="*.q_proj"),
        make("embeddings"),
    )
    assert isinstance(model, PreTrainedModel)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@torch.no_grad()
def loss(model: PreTrainedModel) -> float:
    ids = windows()
    return float(next_token_loss(model(input_ids=ids, use_cache=False).logits, ids))


def briefly(model: PreTrainedModel, parameters: list[nn.Parameter], rate: float = 3e-3) -> None:
    job = Job(parameters=parameters, masks=ZerosStay([]))
    settings = BRIEF.model_copy(update={"learning_rate": rate})
    train(model, Windows(windows()), settings, RunContext(windows(), device=torch.device("cpu")), job=job)


def test_there_and_back_untrained_is_the_same_model() -> None:
    model, ids = mixed_model(), tiny_tokens("llama_gqa")
    before, expected = state(model), model(ids).logits
    with trainable_form(model, wanted()) as parameters:
        assert parameters.keys() == {"weights", "scales", "factors", "adapters"}
        assert not any(isinstance(each, QuantLinear) for each in model.modules())
        assert torch.equal(model(ids).logits, expected)
    assert same(state(model), before) and torch.equal(model(ids).logits, expected)
    assert not any(isinstance(each, TrainableTwin) for each in model.modules())


def test_after_an_exception_the_very_modules_are_back() -> None:
    model = mixed_model()
    before, modules = state(model), dict(model.named_modules())
    with pytest.raises(KeyboardInterrupt), trainable_form(model, wanted()) as parameters:
        with torch.no_grad():
            for group in parameters.values():
                for each in group:
                    each.add_(1.0)
        raise KeyboardInterrupt
    assert same(state(model), before)
    assert all(module is modules[name] for name, module in model.named_modules())


@pytest.mark.parametrize("roles", [ROLES, frozenset[Role]({"scales"}), frozenset[Role]({"adapters", "factors"})])
def test_trained_by_the_loop_the_loss_falls_and_stays_fallen_when_settled(roles: frozenset[Role]) -> None:
    model = mixed_model()
    start, others = loss(model), {name: each.clone() for name, each in model.named_parameters() if "norm" in name}
    codes = [each.codes_OI for each in model.modules() if isinstance(each, QuantLinear)]
    with trainable_form(model, wanted(roles)) as parameters:
        flat = [each for group in parameters.values() for each in group]
        briefly(model, flat, 1e-4 if roles == {"scales"} else 3e-3)  # AdamW's steps have the size of the rate
        trained = loss(model)
    assert trained < start and loss(model) == trained
    assert all(torch.equal(each, others[name]) for name, each in model.named_parameters() if name in others)
    after = [each.codes_OI for each in model.modules() if isinstance(each, QuantLinear)]
    changed = any(not torch.equal(a, b) for a, b in zip(codes, after, strict=True))
    assert changed == ("weights" in roles)


def test_zeros_of_a_sparse_pass_stay_zeros_in_a_training_of_codes() -> None:
    model, _ = compressed("llama_gqa", block_pass("wanda", sparsity=0.5), block_pass("gptq", **GPTQ))
    zeros = {name: each.dense_weight() == 0 for name, each in model.named_modules() if isinstance(each, QuantLinear)}
    with trainable_form(model, wanted(keep_zeros=True)) as parameters:
        flat = [each for group in parameters.values() for each in group]
        briefly(model, flat)
    for name, zero in zeros.items():
        module = model.get_submodule(name)
        assert isinstance(module, QuantLinear) and (module.dense_weight()[zero] == 0).all()


def test_only_what_is_asked_for_is_replaced() -> None:
    model = mixed_model()
    with trainable_form(model, wanted(), only=lambda name: name == SITE):
        twins = [name for name, each in model.named_modules() if isinstance(each, TrainableTwin)]
    assert twins == [SITE]


def test_a_module_without_a_trainable_form_is_named() -> None:
    model = mixed_model()
    model.get_submodule(SITE.rpartition(".")[0]).down_proj = BnbLinear("int8", HIDDEN, FFN, None, torch.bfloat16)
    modules = dict(model.named_modules())
    with (
        pytest.raises(CompressError, match="a bnb_linear has no trainable form") as refused,
        trainable_form(model, wanted()),
    ):
        pass
    assert refused.value.where == SITE
    assert all(module is modules[name] for name, module in model.named_modules())


QUANTIZED: dict[str, tuple[Pass, ...]] = {
    "gptq": (block_pass("gptq", **GPTQ),),
    "cmpq": (block_pass("cmpq", bits=3),),
    "low_rank_correction": (block_pass("low_rank_correction", quantizer={"rtn": GPTQ}, rank=2),),
    "svd, gptq": (block_pass("svd", fraction=0.5), block_pass("gptq", **{**GPTQ, "scheme": "int4_channel"})),
    "bnb_nf4": (block_pass("bnb_nf4", exclude="*.down_proj"),),
    "bnb_int8": (block_pass("bnb_int8"),),
    "w8a8": (block_pass("rtn", scheme="int8_channel_a8token"),),
}


@pytest.mark.parametrize("before", QUANTIZED)
def test_recover_after_any_quantizer_lowers_the_loss_and_leaves_the_codes_alone(before: str) -> None:
    plain, _ = compressed("llama_gqa", *QUANTIZED[before])
    recover = make("recover", rank=4, training=BRIEF.model_dump())
    model, rows = compressed("llama_gqa", *QUANTIZED[before], recover)
    assert loss(model) < loss(plain)
    after = [each for each in model.state_dict().values() if not each.is_floating_point()]
    codes = [each for each in plain.state_dict().values() if not each.is_floating_point()]
    assert codes and all(torch.equal(a, b) for a, b in zip(after, codes, strict=True))
    ranks = {row.rank for row in rows if row.algorithm == "recover"}  # some leave a few sites dense
    assert 4 in ranks
    branches = [each for each in model.modules() if isinstance(each, CorrectedLinear)]
    assert len(branches) >= len(codes) / 2 / 6 and not any("parametrizations" in name for name in model.state_dict())


def test_codes_with_adapters_are_saved_loaded_and_reported(tmp_path: Path) -> None:
    tiny = write_tiny_llama(tmp_path / "tiny", num_hidden_layers=2)
    text = """
calibration: {source: builtin:calibration, samples: 6, tokens: 48, batch: 4}
passes:
  - gptq: {scheme: int3_g16}
  - recover: {rank: 3, training: {steps: 4, batch: 4, learning_rate: 0.003}}
evaluate: {perplexity: [{source: 'builtin:evaluation', window: 48, max_windows: 3}]}
"""
    report = compress(str(tiny), parse_recipe(text, "test"), tmp_path / "out").report
    assert report.bytes_compressed == bytes_on_disk(tmp_path / "out")
    assert {row.rank for row in report.sites if row.algorithm == "recover"} == {3}
    model, _ = load(tmp_path / "out", dtype=torch.float32)
    branches = [each for each in model.modules() if isinstance(each, CorrectedLinear)]
    assert len(branches) == 14 and all(isinstance(each.base, QuantLinear) for each in branches)
    measured = evaluate(str(tmp_path / "out"), parse_recipe(text, "test").evaluate).perplexities
    assert measured[0].perplexity == pytest.approx(report.quality[0].compressed.perplexity, rel=1e-4)


def test_an_adapter_beside_codes_is_exact_when_it_is_kept() -> None:
    model, ids = compressed("llama_gqa", block_pass("gptq", **GPTQ))[0], tiny_tokens("llama_gqa")
    expected = model(ids).logits
    sites = WholeModel(model, map_of("llama_gqa"), RunContext(windows(), batch=4)).sites()
    with adapted(sites, rank=2, scale=2.0, seed=0) as parameters, torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
        for each in parameters:
            each.copy_(torch.randn(each.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
        apart = model(ids).logits
    assert torch.equal(model(ids).logits, apart) and not torch.equal(apart, expected)


def test_after_an_exception_adapters_leave_no_trace() -> None:
    model, _ = compressed("llama_gqa", block_pass("gptq", **GPTQ, sites="*.mlp.*"))
    before = state(model)
    sites = WholeModel(model, map_of("llama_gqa"), RunContext(windows(), batch=4)).sites()
    with pytest.raises(KeyboardInterrupt), adapted(sites, rank=2, scale=2.0, seed=0) as parameters:
        with torch.no_grad():
            for each in parameters:
                each.add_(1.0)
        raise KeyboardInterrupt
    assert same(state(model), before)


NAMES = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


@pytest.mark.parametrize(
    "passes",
    [
        "[gptq, recover: {rank: 4}]",
        "[low_rank_correction, recover: {rank: 4}]",
        "[wanda, recover: {rank: 4}, gptq]",
        "[wanda, recover]",
        "[gptq, recover: {rank: 4}, kv_cache]",
        "[svd, gptq, recover: {rank: 4}]",
        "[wanda: {sites: '*.0.mlp.*'}, gptq: {exclude: '*.0.mlp.*'}, recover: {rank: 4}]",
    ],
)
def test_orders_that_work_are_allowed(passes: str) -> None:
    check_order(parse_recipe(f"passes: {passes}", "r").passes, NAMES)


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        ("[gptq, recover]", "would change weights that are already quantized"),
        ("[wanda, gptq, recover: {rank: 4}]", "would fill zeros through dense adapters"),
        ("[sparsegpt: {pattern: '2:4'}, gptq, recover: {rank: 4}]", "would fill zeros through dense adapters"),
        ("[gptq, recover: {rank: 4}, awq: {round: false}]", "would change weights that are already quantized"),
    ],
)
def test_orders_that_do_not_are_refused_with_the_reason(passes: str, reason: str) -> None:
    with pytest.raises(CompressError) as refused:
        check_order(parse_recipe(f"passes: {passes}", "r").passes, NAMES)
    assert refused.value.code == "recipe.order" and reason in refused.value.what and refused.value.fix
