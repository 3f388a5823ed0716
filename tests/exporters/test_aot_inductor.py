"""A program that AOTInductor compiled computes what PyTorch computes, from our codes in the file beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress.errors import CompressError
from llmcompress.exporters.aot_inductor import AotInductorExporter
from llmcompress.exporters.aot_inductor_file import TENSORS
from llmcompress.exporters.aot_inductor_graph import PackedCodes, packed_linears
from llmcompress.exporters.base import Converted, Refused, Writing
from llmcompress.exporters.contents import CodedLinear, Contents, contents_in
from llmcompress.model_export import export
from llmcompress.modules.low_rank import LowRankLinear
from llmcompress.modules.quant_embedding import QuantEmbedding, SharedHead
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.ranges import fit
from llmcompress.runners.base import RUNNERS
from llmcompress.runners.torch_runner import TorchRunner
from llmcompress.verification.verifying import verified
from tests.exporters.gguf_models import tiny, tiny_quantized, tokenizer

CPU = torch.device("cpu")
IDS_BT = torch.randint(3, 280, (2, 20), generator=torch.Generator().manual_seed(0))
SCHEMES = ["int4_g32", "int8_channel", "int3_g16_asym", "int2_g16", "int8_channel_a8tensor"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """One table of 8 bits for embedding and head, five kinds of codes, low-rank factors."""
    model = tiny_quantized("llama_tied_biased", SCHEMES)
    scheme, table_VD = named_scheme("int8_channel"), model.get_input_embeddings().weight.detach()
    fitted = fit(table_VD, scheme.weights, scale_dtype=torch.bfloat16)
    model.model.embed_tokens = QuantEmbedding.of(scheme, round_to_codes(table_VD, fitted), fitted, 1.0)
    model.lm_head = SharedHead("model.embed_tokens", 288, 64, None)
    model.lm_head.connect(model)
    generator = torch.Generator().manual_seed(1)
    left_OR, right_RI = torch.randn(96, 16, generator=generator) / 8, torch.randn(16, 64, generator=generator) / 8
    model.model.layers[0].mlp.up_proj = LowRankLinear.from_factors(left_OR, right_RI, None).eval()
    folder = tmp_path_factory.mktemp("aot") / "out"
    report = export(model.eval(), "aot_inductor", folder, tokenizer=tokenizer())["aot_inductor"]
    return model, folder, report


def test_logits_and_greedy_tokens_are_pytorchs_and_every_tensor_is_read_back(compiled) -> None:
    model, folder, report = compiled
    assert not report.differing and report.runtime is not None
    assert not verified(folder, name="out").failed
    coded = sum(row.values for row in report.read_back if row.codes_differing == 0)
    assert coded == sum(site.outputs * site.inputs for site in contents_in(model, torch.bfloat16).sites)
    with RUNNERS["aot_inductor"].open(str(folder), device=CPU, dtype=torch.float32) as runner:
        with TorchRunner(model) as reference:
            torch.testing.assert_close(runner.logits(IDS_BT), reference.logits(IDS_BT), rtol=0, atol=2e-5)
            prompts = [[5, 9, 4, 7], [8]]
            assert runner.generate(prompts, max_new_tokens=6) == reference.generate(prompts, max_new_tokens=6)
            steps = [torch.stack(list(each.stream(IDS_BT, max_new_tokens=4)), 1) for each in (runner, reference)]
            assert torch.equal(*steps)
        assert (runner.vocabulary, runner.max_positions) == (288, 128)


def test_the_file_holds_codes_in_their_width(compiled) -> None:
    model, folder, _ = compiled
    held, exporter = load_file(folder / TENSORS), AotInductorExporter()
    for site in contents_in(model, torch.bfloat16).sites:
        if site.name.startswith("model.layers."):
            for name, (dtype, shape) in exporter.tensors(site, torch.bfloat16).items():
                found = held[f"model.{site.name}.{name}"]
                assert (found.dtype, tuple(found.shape)) == (dtype, shape), site.name


def test_a_code_that_changed_in_the_file_is_noticed(compiled, tmp_path: Path) -> None:
    model, folder, _ = compiled
    held = load_file(folder / TENSORS)
    held["model.model.layers.0.self_attn.q_proj.codes"][3, 1] ^= 16
    save_file(held, tmp_path / TENSORS)
    (row,) = [
        row for row in AotInductorExporter().read_back(model, tmp_path, Writing(torch.float32)) if not row.is_same
    ]
    assert (row.source, row.codes_differing) == ("model.layers.0.self_attn.q_proj", 1)


def test_packed_linears_are_there_only_while_it_is_written() -> None:
    model = tiny_quantized("llama")
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="stop"), packed_linears(model):
        assert any(isinstance(part, PackedCodes) for part in model.modules())
        raise ValueError("stop")
    assert dict(model.named_modules()) == before


def test_what_it_holds_and_what_it_refuses(tmp_path: Path) -> None:
    exporter = AotInductorExporter()
    for name, kind in (("int4_g64", Converted), ("int8_channel_a8token", Converted), ("nf4_g64", Refused)):
        assert isinstance(exporter.check(CodedLinear("x", named_scheme(name), 8, 128), torch.bfloat16), kind)
    assert exporter.problem(contents_in(tiny("llama"), torch.bfloat16)) is None
    table = CodedLinear("embed", named_scheme("int8_g48"), 8, 64)
    assert isinstance(exporter.answers(Contents(rounded_embedding=table))["embed"], Refused)
    assert "`gemma2`" in str(exporter.problem(contents_in(tiny("gemma2"), torch.bfloat16)))
    with pytest.raises(CompressError, match=r"model\.pt2"):
        RUNNERS["aot_inductor"].open(str(tmp_path), device=CPU, dtype=torch.float32)
    (tmp_path / "model.pt2").write_bytes(b"nothing")
    (tmp_path / "config.json").write_text(json.dumps(tiny("llama").config.to_dict()))
    with pytest.raises(CompressError, match="cannot load it"):
        RUNNERS["aot_inductor"].open(str(tmp_path), device=CPU, dtype=torch.float32)
