"""Quantization-aware training, end to end and block by block: what is trained, what is stored, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError
from llmcompress.modules.kv_cache import CodedAttention
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.trainable_codes import TwinOfCodes
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES, Pass
from llmcompress.progress import Silent
from llmcompress.run import Run
from llmcompress.training.loop import train
from tests.families import tiny_model
from tests.modules.test_trainable import coded, normal
from tests.passes.distillation.test_distill import Fixed
from tests.passes.quantization.test_gsq import quantized, taught
from tests.passes.quantization.test_learned_rounding import dense_logits, distance
from tests.passes.test_laws import compressed, logits, make, map_of, windows
from tests.training.test_trainable_form import wanted

TRAINING = {"steps": 8, "batch": 2, "learning_rate": 5e-3}
INTEGERS = ["int2_g8", "int3_g8_asym", "int8_channel_a8token", "ternary_g8"]


class Same(Fixed):
    """The original is the model that `tiny_model` gives."""

    def model(self, name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        self.loaded.append(name)
        return tiny_model("llama_gqa", seed=1).to(dtype)


def qat(**options: Any) -> Pass:
    return PASSES["qat"](**{"training": TRAINING, **options})


def trained(*passes: Pass, teachers: Fixed | None = None, **context: Any) -> PreTrainedModel:
    model = tiny_model("llama_gqa", seed=1)
    context = {"batch": 4, "teachers": teachers or Same(), **context}
    return apply_passes(model, map_of("llama_gqa", model), passes, RunContext(windows(), **context)).model


def state(model: nn.Module, word: str) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if word in name}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return any(not torch.equal(tensor, after[name]) for name, tensor in before.items())


RTN = make("rtn", {"scheme": "int3_g32_asym"})


@pytest.mark.parametrize("scheme", INTEGERS)
def test_weights_that_begin_where_the_dense_ones_lie_leave_every_code(scheme: str) -> None:
    module, weight_OI = coded(scheme), normal(6, 24)
    twin = module.trainable(wanted())
    assert isinstance(twin, TwinOfCodes)
    twin.begin_at(weight_OI)
    latent_OI, centre_OI = twin.get_parameter("latent_OI"), module.dense_weight()
    step_O1 = module.scale_OG.abs().amax(1, keepdim=True)
    assert ((latent_OI - centre_OI).abs() <= 0.5 * step_O1 * 1.001).all() and not torch.equal(latent_OI, centre_OI)
    back = twin.compressed()
    assert isinstance(back, QuantLinear) and torch.equal(back.codes_OI, module.codes_OI)
    assert torch.equal(twin(normal(2, 24)), module(normal(2, 24)))


def test_a_dense_weight_on_its_own_code_is_where_training_begins() -> None:
    module = coded("int4_g8")
    exact_OI = module.dense_weight() + 0.3 * module.scale_OG.repeat_interleave(8, 1)
    twin = module.trainable(wanted())
    twin.begin_at(exact_OI)
    torch.testing.assert_close(twin.get_parameter("latent_OI"), exact_OI)


@pytest.mark.parametrize(
    ("before", "schemes"),
    [([RTN], {"int3_g32_asym"}), ([make("rtn", {"scheme": "int8_channel_a8token"})], {"int8_channel_a8token"})],
    ids=["weights", "w8a8"],
)
def test_what_is_stored_computes_what_the_last_forward_computed(
    before: list[Pass], schemes: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    last: list[Tensor] = []

    def watched(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        done = train(model, *args, **kwargs)
        assert any(isinstance(each, TwinOfCodes) for each in model.modules())
        last.append(logits(model))
        return done

    monkeypatch.setattr("llmcompress.passes.retraining.train", watched)
    model = trained(*before, qat())
    assert torch.equal(logits(model), last[0])
    assert {module.scheme.name for module in quantized(model).values()} == schemes


def test_only_what_is_asked_for_is_trained() -> None:
    before = trained(RTN)
    for train_what, changes in {
        ("weights",): {"codes_OI"},
        ("scales",): {"scale_OG"},
        ("weights", "scales"): {"codes_OI", "scale_OG"},
        ("norms",): {"norm"},
        ("zero_points",): {"zero_OG"},
    }.items():
        training = {**TRAINING, "learning_rate": 0.5 if train_what == ("zero_points",) else 0.05}
        after = trained(RTN, qat(train=list(train_what), training=training, objective={"cross_entropy": {}}))
        found = {
            word
            for word in ("codes_OI", "scale_OG", "zero_OG", "norm")
            if moved(state(before, word), state(after, word))
        }
        assert found == changes, train_what


def test_selected_modules_are_trained_and_others_are_not() -> None:
    before, after = trained(RTN), trained(RTN, qat(train=["weights"], sites="*.mlp.*", exclude="*.0.*"))
    changed = {
        name
        for name, each in quantized(after).items()
        if not torch.equal(each.codes_OI, quantized(before)[name].codes_OI)
    }
    assert changed and all(".mlp." in name and ".0." not in name for name in changed)


def test_the_dense_model_teaches_unless_no_objective_reads_it() -> None:
    teachers = Same()
    trained(RTN, qat(start="codes"), teachers=teachers)
    assert teachers.loaded == ["original"] and qat().teachers() == ("original",)
    labels = qat(start="codes", objective={"cross_entropy": {}})
    teachers = Same()
    trained(RTN, labels, teachers=teachers)
    assert not teachers.loaded and not labels.teachers()
    assert qat(objective={"cross_entropy": {}}).teachers() == ("original",), "weights begin at the original's"


def test_kl_to_the_dense_model_falls() -> None:
    dense = tiny_model("llama_gqa", seed=1)
    ids = windows()

    @torch.no_grad()
    def kl(model: PreTrainedModel) -> float:
        theirs, ours = (each(ids).logits.log_softmax(-1) for each in (dense, model))
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    rtn = make("rtn", {"scheme": "int2_g32"})
    assert kl(trained(rtn, qat(training={**TRAINING, "steps": 40}))) < 0.7 * kl(trained(rtn))


def test_a_quantized_cache_is_trained_with_and_keys_have_gradients() -> None:
    before = trained(RTN, PASSES["kv_cache"]())
    after = trained(RTN, PASSES["kv_cache"](), qat(train=["weights"], training={**TRAINING, "learning_rate": 0.05}))
    assert any(isinstance(each, CodedAttention) for each in after.modules())
    for word in ("k_proj.codes_OI", "v_proj.codes_OI"):
        assert moved(state(before, word), state(after, word)), word
    middle = trained(RTN, PASSES["kv_cache"](), qat(train=["weights"], start="codes"))
    dense = trained(RTN, PASSES["kv_cache"](), qat(train=["weights"]))
    assert moved(state(middle, "q_proj.codes_OI"), state(dense, "q_proj.codes_OI")), "below a wrapper too"


@torch.no_grad()
def test_with_gradients_a_quantized_cache_computes_the_same() -> None:
    model = trained(RTN, PASSES["kv_cache"]())
    expected = logits(model)
    with torch.enable_grad():
        found = model(windows(seed=9, count=2)).logits.double()
    torch.testing.assert_close(found, expected)


def test_zeros_of_an_earlier_pass_stay() -> None:
    sparse = PASSES["magnitude"](sparsity=0.5)
    pruned = trained(sparse)
    for last in ((RTN, qat()), (make("efficient_qat", {"scheme": "int3_g32", "steps": 6, "rate": 0.3}),)):
        for name, module in quantized(trained(sparse, *last)).items():
            assert (module.dense_weight()[pruned.get_parameter(f"{name}.weight") == 0] == 0).all(), name


def test_weights_of_another_matrix_are_not_begun_at() -> None:
    """Where blocks are gone, names are those of other blocks: training begins in the middle of the codes."""

    class Other(Same):
        def model(self, name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
            return tiny_model("llama_gqa", seed=7).to(dtype)

    labels = {"objective": {"cross_entropy": {}}, "train": ["weights"]}
    middle, other = trained(RTN, qat(start="codes", **labels)), trained(RTN, qat(**labels), teachers=Other())
    assert torch.equal(logits(middle), logits(other))
    assert not torch.equal(logits(middle), logits(trained(RTN, qat(**labels))))


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="names nothing"):
        qat(train=[])
    with pytest.raises(ValueError, match="remove `stored`"):
        qat(objective={"cross_entropy": {}}, stored={"folder": "x"})
    with pytest.raises(ValueError, match="set `on_policy`"):
        qat(objective={"minillm": {}})
    with pytest.raises(CompressError, match="nothing to train") as refused:
        trained(qat())
    assert refused.value.code == "qat.no-codes"
    with pytest.raises(ValueError, match="integer grid"):
        PASSES["efficient_qat"](scheme="nf4_g64")


def test_when_training_diverges_the_codes_from_before_are_back() -> None:
    class Bad(Silent):
        def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
            if "step 2/" in text:
                with torch.no_grad():
                    self.model.model.layers[0].mlp.down_proj.get_parameter("latent_OI").fill_(float("nan"))

        model: Any = None

    progress, model = Bad(), tiny_model("llama_gqa", seed=1)
    progress.model = model
    expected = quantized(trained(RTN))
    context = RunContext(windows(), batch=4, teachers=Same(), progress=progress)
    with pytest.raises(CompressError, match="diverged"):
        apply_passes(model, map_of("llama_gqa", model), [RTN, qat()], context)
    assert all(torch.equal(each.codes_OI, expected[name].codes_OI) for name, each in quantized(model).items())


@pytest.mark.parametrize("scheme", ["int2_g32", "int3_g32_asym", "ternary_g32", "int8_channel_a8tensor"])
def test_block_by_block_no_block_ends_worse_than_it_began(scheme: str) -> None:
    model, rows = compressed("llama_gqa", make("efficient_qat", {"scheme": scheme, "steps": 16, "rate": 0.01}))
    assert all(row.error <= row.error_before for row in rows if row.error is not None and row.error_before is not None)
    assert {row.algorithm for row in rows} == {"efficient_qat, gptq"} and torch.isfinite(logits(model)).all()


def test_block_by_block_the_whole_model_errs_less_than_its_quantizer_alone() -> None:
    dense = dense_logits("llama")
    options = {"scheme": "int2_g32", "steps": 60, "rate": 0.02, "scale_rate": 0.004, "quantizer": {"gptq": {}}}
    plain = taught("llama", "gptq", {"scheme": "int2_g32"})
    assert distance(taught("llama", "efficient_qat", options), dense) < 0.8 * distance(plain, dense)


def test_block_by_block_codes_scales_and_norms_move() -> None:
    options = {"scheme": "int3_g32_asym", "steps": 20, "rate": 0.1, "scale_rate": 0.02, "quantizer": {"rtn": {}}}
    before, (after, _) = trained(RTN), compressed("llama_gqa", make("efficient_qat", options))
    for word in ("codes_OI", "scale_OG", "norm"):
        assert moved(state(before, word), state(after, word)), word


def test_block_by_block_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class Dying(Silent):
        def step(self, text: str) -> None:
            if "block 1/" in text:
                raise Killed

    learned = make("efficient_qat", {"scheme": "int3_g32", "steps": 5})

    def run(progress: Silent) -> PreTrainedModel:
        with Run.open(tmp_path / "out", fingerprint={}, lock_text="", fresh=False) as keep:
            return trained(learned, keep=keep, progress=progress)

    with pytest.raises(Killed):
        run(Dying())
    assert torch.equal(logits(run(Silent())), logits(trained(learned)))
