"""What every kind of compressed module says of itself is what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from llmcompress.modules.base import MODULES, CompressedModule
from llmcompress.modules.bnb_linear import BnbLinear
from llmcompress.modules.codebook_linear import CodebookLinear
from llmcompress.modules.corrected import CorrectedLinear
from llmcompress.modules.dynamic_activations import ThresholdedLinear
from llmcompress.modules.dynamic_exit import ExitBlock
from llmcompress.modules.dynamic_skip import SkipBlock
from llmcompress.modules.experts import UnfusedExperts
from llmcompress.modules.expression import Chain, InputTransform, Opaque, Sum, Tied
from llmcompress.modules.expression_leaves import Dense, Quantized
from llmcompress.modules.input_transforms import Hadamard, Selection
from llmcompress.modules.kv_cache import CodedAttention
from llmcompress.modules.linear_predictor import LinearPredictor
from llmcompress.modules.low_rank import LowRankLinear, linear_of
from llmcompress.modules.quant_embedding import QuantEmbedding, SharedHead
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.residual import PassThrough, Segment, SegmentNorm, ShortcutBlock
from llmcompress.modules.rounded_inputs import fixed_scale
from llmcompress.modules.scheme import named_scheme
from llmcompress.modules.selected import SelectedColumns, SelectedRows
from llmcompress.modules.tensor_train import TensorTrainEmbedding, TensorTrainHead, TensorTrainLinear
from llmcompress.modules.transformed_input import ClusteredInput, RotatedInput
from llmcompress.modules.tucker import TuckerLinear
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.ranges import fit

OUTPUTS, INPUTS = 12, 10


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


BIAS = random(OUTPUTS, seed=9)


def quantized(weight_OI: Tensor, bias_O: Tensor | None = None, scheme: str = "int4_g4") -> QuantLinear:
    known = named_scheme(scheme)
    fitted = fit(weight_OI, known.weights)
    scale = fixed_scale(torch.tensor(3.0), known) if known.measures_inputs else None
    return QuantLinear.from_fitted(known, round_to_codes(weight_OI, fitted), fitted, bias_O, scale)


def cores(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def wrapped(wrapper: CompressedModule, inner: nn.Module) -> CompressedModule:
    wrapper.take(inner)
    return wrapper


def clustered(bits: int | None) -> ClusteredInput:
    scale_K, zero_K = torch.tensor([0.2, 0.3]), torch.tensor([7, 8], dtype=torch.int32)
    kept = linear_of(random(OUTPUTS, INPUTS), BIAS)
    index_I = torch.arange(INPUTS).flip(0)
    return ClusteredInput(kept, sizes=(4, 6), bits=bits, scale_K=scale_K, zero_K=zero_K, index_I=index_I)


def codebook() -> CodebookLinear:
    width_I = torch.tensor([2, 8, 2, 3, 3, 8, 8, 2, 2, 3])
    generator = torch.Generator().manual_seed(0)
    codes_IO = torch.stack([torch.randint(1 << int(bits), (OUTPUTS,), generator=generator) for bits in width_I])
    levels = {bits: random(int((width_I == bits).sum()), 1 << bits, seed=bits) for bits in (2, 3, 8)}
    places = torch.tensor([3, 77])
    return CodebookLinear.from_codes(codes_IO, width_I, levels, places, random(2), BIAS)


def embedding() -> QuantEmbedding:
    scheme, table_VD = named_scheme("int8_channel_asym"), random(OUTPUTS, INPUTS)
    fitted = fit(table_VD, scheme.weights)
    return QuantEmbedding.of(scheme, round_to_codes(table_VD, fitted), fitted, 3.0)


def shared_head() -> SharedHead:
    head = SharedHead("table", OUTPUTS, INPUTS, BIAS)
    head.connect(nn.ModuleDict({"table": embedding()}))
    return head


def tucker(split: str) -> TuckerLinear:
    heads, rows, across = ((3, 4), 3, 10) if split == "rows" else ((2, 5), 3, 12)
    assert heads[0] * heads[1] == (OUTPUTS if split == "rows" else INPUTS)
    parts = random(2, rows, 4), random(heads[0], 2, seed=1), random(heads[1], 3, seed=2), random(across, 4, seed=3)
    return TuckerLinear(*parts, BIAS, split=split)


def bnb(kind: str, inputs: int) -> BnbLinear:
    return BnbLinear.quantize(kind, random(OUTPUTS, inputs), BIAS, torch.float32)


X = random(2, 5, INPUTS, seed=3)
WIDE = random(2, 5, 128, seed=3)
IDS = torch.tensor([[0, 3, 11], [4, 4, 1]])


@dataclass(frozen=True)
class Example:
    make: Callable[[], CompressedModule]
    input: Tensor = X
    tolerance: float = 1e-5


EXAMPLES: dict[str, list[Example]] = {
    "quant_linear": [
        Example(lambda scheme=scheme: quantized(random(OUTPUTS, INPUTS), BIAS, scheme))
        for scheme in ("int4_g4", "int3_channel_asym", "int8_channel_a8token", "fp8_tensor_a8tensor", "nvfp4_a")
    ],
    "quant_embedding": [Example(embedding, IDS)],
    "shared_head": [Example(shared_head)],
    "low_rank": [
        Example(lambda: LowRankLinear.from_factors(random(OUTPUTS, 3), random(3, INPUTS), BIAS)),
        Example(lambda: LowRankLinear(quantized(random(3, INPUTS)), quantized(random(OUTPUTS, 3), BIAS))),
        Example(lambda: LowRankLinear(linear_of(random(3, INPUTS), random(3)), linear_of(random(OUTPUTS, 3), BIAS))),
    ],
    "corrected": [
        Example(
            lambda: CorrectedLinear(
                quantized(random(OUTPUTS, INPUTS), BIAS),
                linear_of(random(3, INPUTS), None),
                quantized(random(OUTPUTS, 3)),
            )
        )
    ],
    "selected_rows": [
        Example(lambda: SelectedRows.from_rows(random(3, INPUTS), random(3), rows=[7, 0, 2], outputs=OUTPUTS))
    ],
    "selected_columns": [
        Example(lambda: SelectedColumns.from_columns(random(OUTPUTS, 3), BIAS, columns=[7, 0, 2], inputs=INPUTS))
    ],
    "rotated_input": [
        Example(lambda: RotatedInput(linear_of(random(OUTPUTS, INPUTS), BIAS))),
        Example(lambda: RotatedInput(quantized(random(OUTPUTS, INPUTS), BIAS, "int8_channel_a8token"))),
    ],
    "clustered_input": [Example(lambda: clustered(None)), Example(lambda: clustered(4))],
    "codebook_linear": [Example(codebook)],
    "bnb_linear": [
        Example(lambda: bnb("nf4", 128), WIDE),
        Example(lambda: bnb("int8", 128), WIDE, tolerance=2e-3),
        Example(lambda: bnb("int8", 128), WIDE * 3, tolerance=2e-3),
    ],
    "thresholded_linear": [
        Example(lambda: ThresholdedLinear(random(INPUTS, OUTPUTS), BIAS, 0.5)),
        Example(lambda: ThresholdedLinear(random(INPUTS, OUTPUTS), BIAS, 1.5), random(1, 1, INPUTS, seed=3)),
    ],
    "tensor_train": [
        Example(lambda: TensorTrainLinear(cores((1, 3, 5, 2), (2, 4, 2, 1)), BIAS)),
        Example(lambda: TensorTrainLinear(cores((1, 2, 5, 2), (2, 3, 1, 3), (3, 2, 2, 1)), None)),
    ],
    "tensor_train_embedding": [
        Example(lambda: TensorTrainEmbedding(cores((OUTPUTS, 1, 5, 2), (OUTPUTS, 2, 2, 1)), 3.0), IDS)
    ],
    "tensor_train_head": [Example(lambda: TensorTrainHead(cores((OUTPUTS, 1, 5, 2), (OUTPUTS, 2, 2, 1)), BIAS))],
    "tucker": [Example(lambda: tucker("rows")), Example(lambda: tucker("columns"))],
    "segment": [Example(lambda: wrapped(Segment(2, 1), nn.Linear(INPUTS, 4)))],
}
OPAQUE: dict[str, Callable[[], CompressedModule]] = {
    "coded_cache": lambda: CodedAttention("int8", "token", "past_key_values", (1, 1), (4, 4)),
    "exit_block": lambda: ExitBlock(0.9, (), None),
    "skip_block": lambda: SkipBlock(LinearPredictor(random(4), 0.0), 0.5),
    "unfused_experts": lambda: UnfusedExperts(2, 4, 6, ("gate", "up", "down"), "silu", torch.float32),
    "segment_norm": lambda: SegmentNorm(2, 4, 10, 1e-5),
    "shortcuts": lambda: ShortcutBlock((2, 3), torch.float32),
    "pass_through": lambda: PassThrough(4),
}
CASES = [pytest.param(each, id=f"{name} {i}") for name, found in EXAMPLES.items() for i, each in enumerate(found)]


def test_every_kind_has_an_example() -> None:
    assert EXAMPLES.keys() | OPAQUE.keys() == set(MODULES) and not EXAMPLES.keys() & OPAQUE.keys()
    for name, found in EXAMPLES.items():
        if name != "bnb_linear":  # an extra that may not be installed
            assert {type(example.make()) for example in found} == {MODULES[name]}
    assert all(type(make()) is MODULES[name] for name, make in OPAQUE.items())


@pytest.mark.parametrize("example", CASES)
@torch.no_grad()
def test_an_expression_computes_what_its_module_computes(example: Example) -> None:
    module = example.make()
    expression, expected = module.expression(), module(example.input)
    found = expression(example.input)
    assert float((found - expected).abs().max()) <= example.tolerance * float(expected.abs().max())
    assert expression.shape[0] == (found.shape[-1] if example.input.is_floating_point() else module.out_features)
    assert expression.shape[1] == module.in_features


@pytest.mark.parametrize("example", CASES)
@torch.no_grad()
def test_a_linear_one_is_its_weight_and_bias_and_no_other_is(example: Example) -> None:
    module = example.make()
    expression, weight_OI = module.expression(), module.dense_weight()
    torch.testing.assert_close(expression.dense_weight(), weight_OI)
    assert weight_OI.shape == expression.shape
    if example.input.is_floating_point():
        product = nn.functional.linear(example.input, weight_OI, module.dense_bias())
        near = float((product - module(example.input)).abs().max()) <= 1e-5 * float(product.abs().max())
        assert near == expression.is_linear


@pytest.mark.parametrize("name", OPAQUE)
def test_what_cannot_be_said_says_why(name: str) -> None:
    expression = OPAQUE[name]().expression()
    assert isinstance(expression, Opaque) and len(expression.reason.split()) > 4 and not expression.is_linear
    with pytest.raises(TypeError, match=expression.reason):
        expression.dense_weight()


def test_an_expression_can_be_read_down_to_its_codes() -> None:
    low_rank = LowRankLinear(quantized(random(3, INPUTS)), quantized(random(OUTPUTS, 3), BIAS, "int3_channel_asym"))
    corrected = CorrectedLinear(quantized(random(OUTPUTS, INPUTS)), *low_rank.children()).expression()
    assert [type(node) for node in corrected.nodes()] == [Sum, Quantized, Chain, Quantized, Quantized]
    left = low_rank.expression().parts[-1]
    assert isinstance(left, Quantized) and left.scheme.name == "int3_channel_asym"
    assert left.tensor.codes is low_rank.left.codes_OI, "tensors are the module's own, not copies"


def test_transforms_and_ties_are_told() -> None:
    rotated = RotatedInput(linear_of(random(OUTPUTS, INPUTS), None)).expression()
    assert isinstance(rotated, InputTransform) and isinstance(rotated.change, Hadamard)
    assert isinstance(rotated.inner, Dense)
    gathers = clustered(None).expression()
    assert isinstance(gathers, InputTransform) and isinstance(gathers.change, Selection)
    assert gathers.change.is_permutation
    shared = shared_head().expression()
    assert isinstance(shared, Tied) and shared.owner == "table"


def test_live_sizes_count_codes_where_they_are_and_nowhere_twice() -> None:
    assert quantized(random(OUTPUTS, 64), scheme="int4_g32").coded_bits() == OUTPUTS * 64 * 5
    assert LowRankLinear(quantized(random(3, INPUTS)), quantized(random(OUTPUTS, 3))).coded_weights() == 0
    assert shared_head().coded_weights() == 0 and embedding().coded_weights() == OUTPUTS * INPUTS
    assert codebook().coded_weights() == OUTPUTS * INPUTS


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4 * 12 * 128 + 8 * 24 + 32 + 32), ("int8", 8 * 12 * 128 + 12 * 32)])
def test_codes_of_bitsandbytes_take_their_blocks_scales_too(kind: str, bits: int) -> None:
    assert bnb(kind, 128).coded_bits() == bits and bnb(kind, 128).coded_weights() == 12 * 128
