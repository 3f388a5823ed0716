"""A small space, and a latency table with simple rules, for tests of what is computed from tables."""

from __future__ import annotations

from transformers import LlamaConfig

from llmcompress.model.probe import probe
from llmcompress.plan_search.costs.forms import Forms, Matrix
from llmcompress.plan_search.costs.latency_table import BlockRest, LatencyTable, Product, Seconds, shapes_of
from llmcompress.plan_search.costs.seconds import wanted_matrices
from llmcompress.plan_search.plan_space import PlanSpace
from llmcompress.plan_search.space import Space

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=288,
    max_position_embeddings=64,
)
SPACE = {
    "sites": {"dense": [], "int4": [{"rtn": {"scheme": "int4_g16"}}]},
    "bodies": {"whole": [], "narrow": [{"width": {"fraction": 0.25, "heads": False}}]},
    "after": {"none": [], "rounded": [{"embeddings": {"embedding": "int8_channel"}}]},
    "most_dropped": 0.5,
}
BITS = {"dense": 32, "int4_g16": 4, "int8_channel": 8}
BITS_PER_SECOND = 1e6


def small_space() -> PlanSpace:
    """Three blocks, two options, two bodies, two heads."""
    return PlanSpace(Space.model_validate(SPACE), probe(CONFIG))


def seconds_of_bits(matrix: Matrix) -> Seconds:
    """A product takes as long as its bits."""
    decode = matrix.weights * BITS[matrix.form] / BITS_PER_SECOND
    return Seconds(prefill=8 * decode, decode=decode)


def table_of(space: PlanSpace) -> LatencyTable:
    """Products by their bits; the rest of a block as many seconds, and bytes, as it is wide; 5 s without blocks."""
    forms = Forms(space)
    linears, heads = (tuple(map(_product, matrices)) for matrices in wanted_matrices(space, forms))
    rests = {shapes_of(info): info.structure.site("mlp.down_proj").inputs for info in forms.blocks.values()}
    return LatencyTable(
        runtime="torch",
        by="microbenchmarks",
        versions={},
        device="cpu",
        processor="none",
        threads=1,
        clock="wall",
        batch=2,
        context=16,
        turns=1,
        products=linears,
        heads=heads,
        blocks=tuple(
            BlockRest(shapes=shapes, seconds=Seconds(prefill=2.0, decode=float(width)), spread=0.0, bytes=width)
            for shapes, width in rests.items()
        ),
        outside=Seconds(prefill=3.0, decode=5.0),
        outside_bytes=1000,
    )


def _product(matrix: Matrix) -> Product:
    size = {"outputs": matrix.outputs, "inputs": matrix.inputs, "bytes": matrix.weights * BITS[matrix.form] // 8}
    return Product(form=matrix.form, seconds=seconds_of_bits(matrix), spread=0.0, **size)
