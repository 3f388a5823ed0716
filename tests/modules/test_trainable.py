"""Laws of trainable twins, for every kind of compressed module: how they begin, learn and end."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import llmcompress.modules
from llmcompress.errors import CompressError
from llmcompress.modules.base import MODULES, CompressedModule, TrainableTwin
from llmcompress.modules.bnb_linear import BnbLinear
from llmcompress.modules.codebook_linear import CodebookLinear
from llmcompress.modules.corrected import CorrectedLinear
from llmcompress.modules.dynamic_activations import ThresholdedLinear
from llmcompress.modules.low_rank import LowRankLinear, linear_of
from llmcompress.modules.quant_embedding import QuantEmbedding, SharedHead
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.residual import PassThrough, SegmentNorm
from llmcompress.modules.rounded_inputs import fixed_scale
from llmcompress.modules.scheme import named_scheme
from llmcompress.modules.selected import SelectedColumns, SelectedRows
from llmcompress.modules.tensor_train import TensorTrainEmbedding, TensorTrainHead, TensorTrainLinear
from llmcompress.modules.trainable_roles import ROLES, Role, TrainableRoles
from llmcompress.modules.transformed_input import ClusteredInput, RotatedInput
from llmcompress.modules.tucker import TuckerLinear
from llmcompress.numerics.codebook import column_levels, nearest_level
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.ranges import fit

OUT, IN, RANK = 6, 24, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def coded(name: str, outputs: int = OUT, inputs: int = IN, *, bias: bool = True) -> QuantLinear:
    """Scales hold values of bfloat16; a third of the weights are zeros."""
    scheme = named_scheme(name)
    weight_OI = normal(outputs, inputs)
    weight_OI[:, ::3] = 0
    fitted = fit(weight_OI, scheme.weights, scale_dtype=torch.bfloat16)
    scale = fixed_scale(torch.tensor(2.0), scheme) if scheme.measures_inputs else None
    bias_O = normal(outputs) if bias else None
    return QuantLinear.from_fitted(scheme, round_to_codes(weight_OI, fitted), fitted, bias_O, scale)


def embedded(name: str) -> QuantEmbedding:
    weight_VD, scheme = normal(OUT, IN), named_scheme(name)
    fitted = fit(weight_VD, scheme.weights, scale_dtype=torch.bfloat16)
    return QuantEmbedding.of(scheme, round_to_codes(weight_VD, fitted), fitted, 3.0)


def factored() -> LowRankLinear:
    return LowRankLinear.from_factors(normal(OUT, RANK), normal(RANK, IN), normal(OUT))


def corrected(branch: str | None = None) -> CorrectedLinear:
    right, left = linear_of(normal(RANK, IN), None), linear_of(normal(OUT, RANK), None)
    if branch is None:
        return CorrectedLinear(coded("int3_g8"), right, left)
    return CorrectedLinear(coded("int3_g8"), coded(branch, RANK, IN, bias=False), coded(branch, OUT, RANK, bias=False))


def clustered(kept: nn.Module) -> ClusteredInput:
    return ClusteredInput(
        kept, sizes=(10, IN - 10), bits=6, scale_K=torch.tensor([0.1, 0.05]),
        zero_K=torch.tensor([30, 31], dtype=torch.int32), index_I=torch.randperm(IN),
    )  # fmt: skip


def codebooks() -> CodebookLinear:
    weight_IO, width_I = normal(IN, OUT), torch.tensor([2, 3, 4] * (IN // 3))
    codes_IO, levels = torch.zeros(IN, OUT, dtype=torch.int16), {}
    for bits in (2, 3, 4):
        levels[bits] = column_levels(weight_IO[width_I == bits], 1 << bits).bfloat16().float()
        codes_IO[width_I == bits] = nearest_level(weight_IO[width_I == bits], levels[bits])
    return CodebookLinear.from_codes(codes_IO, width_I, levels, torch.tensor([3, 50]), torch.tensor([4.0, -5]), None)


def trained_kinds() -> dict[str, Callable[[], CompressedModule]]:
    schemes = [
        "int4_g8",
        "int3_channel",
        "int2_g8",
        "int8_channel",
        "int4_g7",
        "int4_g8_asym",
        "int2_channel_asym",
        "ternary_g8",
    ]
    schemes += ["int8_channel_a8token", "int8_channel_a8tensor", "fp8_channel", "fp8_tensor", "fp8e5m2_g8"]
    schemes += ["fp4_g8", "nf4_g8", "mxfp4", "mxfp8", "nvfp4", "nvfp4_a"]
    kinds: dict[str, Callable[[], CompressedModule]] = {
        f"quant_linear {name}": lambda name=name: coded(name) for name in schemes
    }
    kinds |= {f"quant_embedding {name}": lambda name=name: embedded(name) for name in ("int4_g8", "int4_g8_asym")}
    return kinds | {
        "low_rank": factored,
        "low_rank of codes": lambda: LowRankLinear(
            coded("int4_g8", RANK, IN, bias=False), coded("int8_channel", OUT, RANK)),
        "low_rank with a corrected factor": lambda: LowRankLinear(linear_of(normal(OUT, IN), None), CorrectedLinear(
            coded("int4_channel", OUT, OUT), linear_of(normal(2, OUT), None), linear_of(normal(OUT, 2), None))),
        "corrected": corrected,
        "corrected by codes": lambda: corrected("int8_channel"),
        "selected_rows": lambda: SelectedRows(coded("int4_g8", 3, IN), OUT, torch.tensor([0, 2, 5])),
        "selected_columns": lambda: SelectedColumns(coded("int4_g8", OUT, 8), IN, torch.arange(0, IN, 3)),
        "rotated_input": lambda: RotatedInput(coded("int4_g8_asym")),
        "clustered_input": lambda: clustered(coded("int4_g8")),
        "clustered_input, dense": lambda: clustered(linear_of(normal(OUT, IN), normal(OUT))),
        "tensor_train": lambda: TensorTrainLinear([normal(1, 2, 4, 3), normal(3, 3, 6, 1)], normal(OUT)),
        "tensor_train_embedding": lambda: TensorTrainEmbedding([normal(OUT, 1, 4, 3), normal(OUT, 3, 6, 1)], 2.0),
        "tensor_train_head": lambda: TensorTrainHead([normal(OUT, 1, 4, 3), normal(OUT, 3, 6, 1)], normal(OUT)),
        "tucker": lambda: TuckerLinear(
            normal(2, 2, 5), normal(3, 2), normal(2, 2), normal(IN, 5), normal(OUT), split="rows"),
        "thresholded_linear": lambda: ThresholdedLinear(normal(IN, OUT), normal(OUT), 0.3),
        "codebook_linear": codebooks,
    }  # fmt: skip


TRAINED = trained_kinds()
NONE: dict[str, Callable[[], CompressedModule] | None] = {
    "bnb_linear": lambda: BnbLinear("int8", OUT, IN, None, torch.bfloat16),
    "shared_head": lambda: SharedHead("table", OUT, IN, None),
    "segment_norm": lambda: SegmentNorm(0, IN, IN, 1e-6),
    "pass_through": lambda: PassThrough(IN),
    # they stand around a block or a linear, in which twins are put
    **dict.fromkeys(("segment", "shortcuts", "exit_block", "skip_block", "coded_cache", "unfused_experts")),
}


def everything(roles: frozenset[Role] = ROLES, *, keep_zeros: bool = True) -> TrainableRoles:
    return TrainableRoles(roles, keep_zeros=keep_zeros, storage_dtype=torch.bfloat16)


def inputs_of(module: CompressedModule) -> Tensor:
    if "embedding" in MODULES.name_of(type(module)):
        return torch.arange(OUT).repeat(2).view(2, OUT)
    return normal(2, 5, IN, seed=7)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.float().signbit(), b.float().signbit())


def same_module(a: CompressedModule, b: CompressedModule) -> bool:
    """The same type, spec and tensors, buffers that are no part of the state included."""
    tensors = [dict((*each.named_parameters(), *each.named_buffers())) for each in (a, b)]
    flags = [[parameter.requires_grad for parameter in each.parameters()] for each in (a, b)]
    return (
        type(a) is type(b)
        and a.spec() == b.spec()
        and flags[0] == flags[1]
        and a.training == b.training
        and tensors[0].keys() == tensors[1].keys()
        and all(same_bits(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    )


def loss_of(twin: TrainableTwin, x: Tensor) -> Tensor:
    """Random, and different for every output."""
    out = twin(x)
    assert isinstance(out, Tensor)
    return (out * normal(*out.shape, seed=9)).sum() + out.square().mean()


def moved(twin: TrainableTwin, share: float = 0.4) -> None:
    """Every number away from where it began: weights beyond their ranges too, so that zero points have gradients."""
    with torch.no_grad():
        for index, (_, parameter) in enumerate(twin.trained()):
            parameter.mul_(1 + share * normal(*parameter.shape, seed=index).abs())


def test_every_registered_kind_is_trained_here_or_said_to_have_no_trainable_form() -> None:
    for found in pkgutil.iter_modules(llmcompress.modules.__path__):
        importlib.import_module(f"llmcompress.modules.{found.name}")
    kinds = {name.split()[0].rstrip(",") for name in TRAINED}
    assert kinds | NONE.keys() == set(MODULES) and not kinds & NONE.keys()
    for make in TRAINED.values():
        assert not make().frame


@pytest.mark.parametrize("kind", NONE)
def test_a_kind_without_a_trainable_form_says_so(kind: str) -> None:
    assert MODULES[kind].trainable is CompressedModule.trainable
    assert MODULES[kind].frame or kind == "bnb_linear"
    make = NONE[kind]
    if make:
        with pytest.raises(CompressError, match=f"{kind} has no trainable form") as raised:
            make().trainable(everything())
        assert raised.value.fix


@pytest.mark.parametrize("keep_zeros", [True, False])
@pytest.mark.parametrize("kind", TRAINED)
def test_a_fresh_twin_computes_and_becomes_what_the_module_was_to_the_bit(kind: str, keep_zeros: bool) -> None:
    module = TRAINED[kind]().eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = inputs_of(module)
    expected = module(x)
    for roles in (ROLES, ROLES - {"weights", "factors"}, frozenset[Role]({"scales"}), frozenset[Role]({"adapters"})):
        twin = module.trainable(everything(roles, keep_zeros=keep_zeros))
        assert same_bits(twin(x).detach(), expected.detach())
        assert same_bits(twin.dense_weight().detach(), module.dense_weight().detach())
        assert same_module(twin.compressed(), module)
        assert {role for role, _ in twin.trained()} <= roles
        assert all(parameter.requires_grad for _, parameter in twin.trained())
        wanted = {id(parameter) for _, parameter in twin.trained()}
        assert not any(p.requires_grad for p in twin.parameters() if id(p) not in wanted) or "adapters" in roles
    assert all(same_bits(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("kind", TRAINED)
def test_every_parameter_has_a_finite_gradient_that_is_not_zero(kind: str) -> None:
    """Of weights that lie on their codes an LSQ scale has none, of weights inside the range a zero point: all move."""
    module = TRAINED[kind]()
    twin = module.trainable(everything(keep_zeros=False))
    assert twin.trained()
    moved(twin)
    loss_of(twin, inputs_of(module)).backward()
    for role, parameter in twin.trained():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), role
        assert (parameter.grad != 0).any(), role


@pytest.mark.parametrize("keep_zeros", [True, False])
@pytest.mark.parametrize("roles", [ROLES, ROLES - {"weights", "factors"}], ids=["all", "without weights"])
@pytest.mark.parametrize("kind", TRAINED)
def test_after_some_steps_the_settled_module_computes_what_the_last_forward_did(
    kind: str, roles: frozenset[Role], keep_zeros: bool
) -> None:
    module = TRAINED[kind]().eval()
    x, zero = inputs_of(module), module.dense_weight() == 0
    twin = module.trainable(everything(roles, keep_zeros=keep_zeros))
    if not twin.trained():
        return
    moved(twin, 0.1)
    optimizer = torch.optim.SGD([parameter for _, parameter in twin.trained()], lr=3e-2, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(twin, x).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        last, settled = twin(x), twin.compressed()
        assert same_bits(settled(x), last)
        assert torch.equal(settled.dense_weight(), twin.dense_weight())
        assert not torch.equal(last, module(x))
        if keep_zeros and isinstance(module, QuantLinear):
            assert zero.any() and (settled.dense_weight()[zero] == 0).all()
        if isinstance(settled, QuantLinear):
            assert torch.equal(settled.scale_OG, settled.scale_OG.bfloat16().float())
            if "weights" not in roles and not keep_zeros:
                assert torch.equal(settled.codes_OI, module.codes_OI)


def test_scales_of_bfloat16_modules_and_negative_ones_come_back() -> None:
    for name in ("int3_g8", "int4_g8_asym", "nvfp4", "mxfp4", "nf4_g8"):
        module = coded(name).to(torch.bfloat16)
        if name == "int3_g8":
            assert (module.scale_OG < 0).any() and (module.scale_OG > 0).any()
        twin = module.trainable(everything())
        x = normal(4, IN).bfloat16()
        assert same_bits(twin(x).detach(), module(x).detach())
        assert same_module(twin.compressed(), module)


def test_one_bit_pattern_of_two_for_zero_survives() -> None:
    """E2M1 has a negative zero, which rounding never gives."""
    module = coded("fp4_g8")
    module.codes_OI[0, :2] = 8
    settled = module.trainable(everything()).compressed()
    assert isinstance(settled, QuantLinear) and torch.equal(settled.codes_OI, module.codes_OI)


def test_a_scale_never_changes_its_sign_nor_vanishes() -> None:
    module = coded("int3_g8")
    twin = module.trainable(everything())
    with torch.no_grad():
        twin.get_parameter("scale_OG").mul_(-1)
        settled = twin.compressed()
        assert isinstance(settled, QuantLinear)
        assert (settled.scale_OG.sign() == module.scale_OG.sign()).all()
        assert settled.dense_weight().isfinite().all()


def test_adapters_alone_leave_a_base_without_trainable_form_as_it_is() -> None:
    base = BnbLinear("int8", OUT, IN, None, torch.bfloat16)
    module = CorrectedLinear(base, linear_of(normal(RANK, IN), None), linear_of(normal(OUT, RANK), None))
    twin = module.trainable(everything(frozenset({"adapters"})))
    assert [role for role, _ in twin.trained()] == ["adapters", "adapters"]
    with pytest.raises(CompressError, match="no trainable form"):
        module.trainable(everything())
