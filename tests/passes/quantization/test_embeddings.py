"""Embedding and head as codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmcompress.errors import CompressError
from llmcompress.evaluation.footprint import footprint, ideal_bytes, parameters
from llmcompress.exporters.save import save_model
from llmcompress.modules.quant_embedding import QuantEmbedding, SharedHead
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.passes.base import PASSES
from llmcompress.recipe import parse_recipe
from llmcompress.recipe.order import check_order
from tests.families import FAMILIES, tiny_model
from tests.passes.test_laws import compressed, logits, map_of


def embeddings(**options: Any) -> Any:
    return PASSES["embeddings"](**options)


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_hardly_move_the_logits_of_any_family(family: str) -> None:
    dense = tiny_model(family, seed=1)
    before = logits(dense)
    model, rows = compressed(family, embeddings())
    assert (logits(model) - before).abs().median() < 0.05 * before.abs().max()
    tied = map_of(family, dense).tied
    assert len(rows) == 2
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert isinstance(model.get_output_embeddings(), SharedHead if tied else QuantLinear)
    untouched = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, untouched[name]), name
    ids = torch.tensor([[3, 4, 5]])
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 6)


@pytest.mark.parametrize("scheme", ["int3_g32_asym", "fp8_tensor", "nf4_g32", "mxfp4", "nvfp4"])
def test_a_look_up_restores_its_rows_as_the_whole_table_would(scheme: str) -> None:
    for family in ("llama_gqa", "gemma2"):
        plain = tiny_model(family, seed=1).get_input_embeddings()
        model, _ = compressed(family, embeddings(embedding=scheme, head=scheme, tied="untie"))
        table = model.get_input_embeddings()
        ids = torch.tensor([[0, 5, 5], [17, 2, 99]])
        stock = nn.Embedding.from_pretrained(table.dense_weight())(ids)
        assert torch.equal(table(ids), stock if table.multiplier == 1.0 else stock * table.multiplier)
        assert (table(ids) - plain(ids)).norm() < 0.3 * plain(ids).norm()


def test_a_shared_table_is_counted_and_stored_once(tmp_path: Path) -> None:
    family = next(name for name in FAMILIES if map_of(name, tiny_model(name, seed=1)).tied)
    sizes = {}
    for tied in ("share", "untie"):
        model, rows = compressed(family, embeddings(tied=tied), dtype=torch.bfloat16)
        saved = save_model(model, tmp_path / tied, "auto", storage_dtype=torch.bfloat16, max_shard_size="5GB")
        assert saved.format == "llmcompress"
        found = footprint(tmp_path / tied)
        assert found.embedding == model.get_input_embeddings().codes_OI.numel()
        assert found.parameters == parameters(model)
        assert (found.head == 0) == (tied == "share")
        assert found.ideal_bytes == ideal_bytes(model.to(torch.bfloat16))
        sizes[tied] = found.stored_bytes
        assert rows[0].bits_per_weight == pytest.approx(8 + 16 / model.config.hidden_size)
    assert sizes["untie"] > sizes["share"]


def test_two_schemes_for_one_table_are_refused() -> None:
    family = next(name for name in FAMILIES if map_of(name, tiny_model(name, seed=1)).tied)
    model_map = map_of(family, tiny_model(family, seed=1))
    with pytest.raises(CompressError, match="different schemes"):
        embeddings(embedding="int8_channel", head=None).check(model_map)
    embeddings(embedding="int8_channel", head=None, tied="untie").check(model_map)


def test_one_of_the_two_stays_dense_on_request() -> None:
    model, rows = compressed("llama_gqa", embeddings(embedding=None, head="int4_g32", tied="untie"))
    assert isinstance(model.get_input_embeddings(), nn.Embedding) and len(rows) == 1
    assert isinstance(model.get_output_embeddings(), QuantLinear)


def test_a_width_that_does_not_divide_is_refused_with_the_way_out() -> None:
    with pytest.raises(CompressError, match="do not divide"):
        compressed("llama_gqa", embeddings(embedding="int4_g48", head="int4_g48"))


def test_codes_of_blocks_and_tables_go_together_and_a_table_is_rounded_once() -> None:
    model, rows = compressed("llama_gqa", PASSES["rtn"](scheme="int4_g32"), embeddings())
    assert {row.algorithm for row in rows} == {"rtn", "embeddings"} and torch.isfinite(logits(model)).all()
    with pytest.raises(CompressError, match="not an nn"):
        compressed("llama_gqa", embeddings(), embeddings())


@pytest.mark.parametrize("later", ["rotation: {}", "slicegpt: {}", "tensorgpt: {}", "embeddings: {}"])
def test_what_rotates_or_factors_tables_cannot_follow(later: str) -> None:
    with pytest.raises(CompressError, match="ordinary embedding") as caught:
        parse_recipe(f"passes: [{{embeddings: {{}}}}, {{{later}}}]", "test")
    assert caught.value.code == "recipe.order"
    with pytest.raises(CompressError, match="ordinary embedding"):
        name, _ = later.split(":")
        check_order([embeddings(), PASSES[name]()], [])


@torch.no_grad()
def test_blocks_are_compressed_after_the_tables_as_well() -> None:
    passes = (PASSES["smoothquant"](), PASSES["gptq"](scheme="int8_channel_a8token"))
    parse_recipe("passes: [{embeddings: {}}, {smoothquant: {}}, {gptq: {scheme: int8_channel_a8token}}]", "test")
    model, rows = compressed("llama_gqa", embeddings(), *passes)
    assert {row.algorithm for row in rows} >= {"embeddings", "gptq"} and torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("options", [{"embedding": "int8_channel_a8token"}, {"head": "nvfp4_a"}], ids=str)
def test_inputs_that_nobody_measures_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"does not calibrate activations|token ids"):
        embeddings(**options)
