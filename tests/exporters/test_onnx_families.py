"""ONNX through Optimum, which needs transformers 4.57: the runtime computes what PyTorch computes, for every family."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from llmcompress import export
from llmcompress.environments.known import Environment
from llmcompress.exporters import onnx_graph, onnx_graph_program
from llmcompress.exporters.base import Exact, Writing
from llmcompress.exporters.contents import contents_in
from llmcompress.exporters.onnx import OnnxExporter
from llmcompress.modules.low_rank import LowRankLinear
from llmcompress.modules.quant_embedding import QuantEmbedding, SharedHead
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.ranges import fit
from llmcompress.runners.base import RUNNERS
from llmcompress.runners.torch_runner import TorchRunner
from llmcompress.verification.verifying import verified
from tests.exporters.gguf_models import MODELS, tiny, tokenizer
from tests.exporters.quantized import quantize

pytestmark = pytest.mark.transformers4

FAMILIES = ["llama", "llama_tied_biased", "mistral", "qwen2", "qwen3", "gemma", "opt", "gpt2", "gpt_neox", "phi3"]
SCHEMES = ["int4_g32", "int8_channel", "int3_g48_asym", "int2_g16"]
IDS_BT = torch.randint(3, 280, (2, 20), generator=torch.Generator().manual_seed(0))
PROMPTS = [[5, 9, 4, 7], [8]]
CPU = torch.device("cpu")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program runs in this interpreter: importing Optimum takes most of its time."""

    def run(environment: Environment, arguments: Sequence[str], **rest: object) -> str:
        assert environment.name == "optimum-onnx"
        onnx_graph_program.main(*arguments[-2:])
        return ""

    monkeypatch.setattr(onnx_graph, "run", run)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families that GGUF has no row for."""
    sizes = {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 64}
    for name, config in {"opt": sizes, "gpt2": {"model_type": "gpt2"}, "gpt_neox": {"model_type": "gpt_neox"}}.items():
        monkeypatch.setitem(MODELS, name, config)


def test_logits_and_greedy_tokens_of_every_family(in_process: None, models: None, tmp_path: Path) -> None:
    for family in FAMILIES:
        model, folder, writing = tiny(family), tmp_path / family, Writing(torch.bfloat16)
        quantize(model, SCHEMES)
        compare(model, folder, writing)


def compare(model, folder: Path, writing: Writing) -> None:
    exporter = OnnxExporter(accuracy_level=0)
    contents = contents_in(model, torch.bfloat16)
    assert exporter.problem(contents) is None
    assert all(isinstance(answer, Exact) for answer in exporter.answers(contents).values())
    exporter.write(model, folder, writing)
    rows = exporter.read_back(model, folder, writing)
    assert all(row.is_same for row in rows)
    assert {site.name for site in contents.sites} <= {row.source for row in rows if row.codes_differing == 0}
    opened = RUNNERS["onnxruntime"].open(str(folder), device=CPU, dtype=torch.float32)
    with opened as runner, TorchRunner(model) as reference:
        torch.testing.assert_close(runner.logits(IDS_BT), reference.logits(IDS_BT), rtol=0, atol=2e-5)
        assert runner.generate(PROMPTS, max_new_tokens=6) == reference.generate(PROMPTS, max_new_tokens=6)
        steps = list(runner.stream(IDS_BT, max_new_tokens=3))
        assert torch.equal(torch.stack(steps, 1), torch.stack(list(reference.stream(IDS_BT, max_new_tokens=3)), 1))
        own, wanted = runner.work(IDS_BT), reference.work(IDS_BT)
        assert own is not None and wanted is not None and own.cache_bytes == wanted.cache_bytes


def test_low_rank_pruned_channels_and_a_tied_table_of_codes(in_process: None, tmp_path: Path) -> None:
    model = tiny("llama_tied_biased")
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    with torch.no_grad():
        first.up_proj = LowRankLinear.from_factors(torch.randn(96, 16) / 8, torch.randn(16, 64) / 8, None)
        for name, kept in (("gate_proj", (40, 64)), ("up_proj", (40, 64)), ("down_proj", (64, 40))):
            old, new = getattr(second, name), nn.Linear(kept[1], kept[0], bias=True)
            new.weight.copy_(old.weight[: kept[0], : kept[1]])
            new.bias.copy_(old.bias[: kept[0]])
            setattr(second, name, new.requires_grad_(False))
    scheme, table_VD = named_scheme("int8_channel"), model.get_input_embeddings().weight.detach()
    fitted = fit(table_VD, scheme.weights, scale_dtype=torch.bfloat16)
    model.model.embed_tokens = QuantEmbedding.of(scheme, round_to_codes(table_VD, fitted), fitted, 1.0)
    model.lm_head = SharedHead("model.embed_tokens", 288, 64, None)
    model.lm_head.connect(model)
    compare(model.eval(), tmp_path / "out", Writing(torch.float32))


def test_an_exported_folder_loads_in_optimum_and_says_how_it_was_proven(tmp_path: Path) -> None:
    """The whole way, with the program in a process of its own."""
    from optimum.onnxruntime import ORTModelForCausalLM

    model = tiny("llama")
    quantize(model, ["int4_g32"])
    made = export(model, "onnx", tmp_path / "out", tokenizer=tokenizer(), options={"onnx": {"accuracy_level": 0}})[
        "onnx"
    ]
    assert not made.differing and made.runtime is not None
    assert made.runtime.greedy_same == made.runtime.greedy_tokens and made.runtime.largest_logit_difference < 1e-4
    assert not verified(tmp_path / "out", name="out").failed
    assert "ORTModelForCausalLM" in (tmp_path / "out" / "README.md").read_text()
    loaded = ORTModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        wanted = model.generate(IDS_BT[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(loaded.generate(IDS_BT[:1], max_new_tokens=8, do_sample=False), wanted)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["model_type"] == "llama" and "quantization_config" not in saved
