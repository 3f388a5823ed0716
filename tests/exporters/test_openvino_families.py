"""Optimum's own graphs of every family, filled with our codes: needs transformers 4.57."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openvino
import pytest
import torch
from transformers import PreTrainedModel

from llmcompress import export
from llmcompress.calibration.offloading import InMemory
from llmcompress.exporters import openvino_graph
from llmcompress.exporters.base import Writing
from llmcompress.exporters.openvino_read_back import read_back
from llmcompress.exporters.openvino_request import GRAPH, GraphRequest, request_of, write_request
from llmcompress.exporters.openvino_surgery import read_graph, replace_placeholders, write_graph
from llmcompress.model.rotation import untie
from llmcompress.modules.low_rank import LowRankLinear
from llmcompress.runners.openvino import EXACT, OpenVinoRunner
from llmcompress.runners.torch_runner import TorchRunner
from llmcompress.verification.verifying import verified
from tests.exporters.gguf_models import MODELS, tiny, tokenizer
from tests.exporters.quantized import quantize
from tests.families import tiny_model

pytestmark = pytest.mark.transformers4

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "opt", "gpt2", "gpt_neox", "phi3")
SCHEMES = ["int4_g32", "int4_g16_asym", "int8_channel", "int3_channel"]
IDS_BT = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))
PROMPTS = [[5, 9, 4, 7, 11, 3], [8], [6, 5, 4]]


def made(family: str) -> PreTrainedModel:
    """A tiny model with codes; of one family the blocks have different widths and low-rank factors too."""
    tied = {"tie_word_embeddings": True} if family == "llama" else {}
    model = tiny(family, **tied) if family in MODELS else tiny_model(family)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    if family == "llama":
        mlp = model.model.layers[0].mlp
        for name in ("gate_proj", "up_proj"):
            linear = mlp.get_submodule(name)
            linear.weight = torch.nn.Parameter(linear.weight[:64].clone())
            linear.out_features = 64
        mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :64].clone())
        mlp.down_proj.in_features = 64
        left, right = torch.randn(64, 8) / 8, torch.randn(8, 64) / 8
        model.model.layers[1].self_attn.o_proj = LowRankLinear.from_factors(left, right, None)
    quantize(model, SCHEMES)
    return model.eval()


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[PreTrainedModel, GraphRequest, Path]]]:
    """Every family's graph with placeholders, all made by one process: importing Optimum takes half of its time."""
    found = {}
    for family in FAMILIES:
        model, folder = made(family), tmp_path_factory.mktemp(family) / "scratch"
        request = request_of(model, torch.float32, as_dense=False)
        write_request(model, request, folder, Writing(torch.float32))
        found[family] = (model, request, folder)
    program, folders = str(Path(openvino_graph.__file__)), [str(folder) for _, _, folder in found.values()]
    done = subprocess.run([sys.executable, "-P", program, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    yield found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_pytorch_computes(family: str, graphs, tmp_path: Path) -> None:
    model, request, folder = graphs[family]
    graph, file = read_graph(folder / "graph" / f"{GRAPH}.xml"), tmp_path / f"{GRAPH}.xml"
    kept = replace_placeholders(graph, request, torch.float32, weights_at=InMemory())
    write_graph(graph, file)
    del graph, kept
    rows = read_back(file, request, torch.float32)
    assert all(row.is_same for row in rows)
    assert {row.stored_as for row in rows} >= {"i4", "u4", "i8", "f32"}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with OpenVinoRunner(tmp_path) as runner, TorchRunner(model) as reference:
        torch.testing.assert_close(runner.logits(IDS_BT), reference.logits(IDS_BT), rtol=0, atol=1e-5)
        assert runner.generate(PROMPTS, max_new_tokens=6) == reference.generate(PROMPTS, max_new_tokens=6)


def test_an_exported_folder_opens_in_optimum_and_in_openvino_genai(tmp_path: Path) -> None:
    from openvino_genai import LLMPipeline
    from optimum.intel import OVModelForCausalLM

    model = tiny("llama")
    untie(model)
    quantize(model, SCHEMES)
    report = export(model, "openvino", tmp_path / "out", tokenizer=tokenizer())["openvino"]
    assert not report.differing and report.runtime is not None
    assert report.runtime.greedy_same == report.runtime.greedy_tokens and report.runtime.largest_logit_difference < 1e-4
    assert not verified(tmp_path / "out", name="out").failed
    opened = OVModelForCausalLM.from_pretrained(tmp_path / "out", ov_config=dict(EXACT))
    with torch.no_grad():
        wanted = model(IDS_BT).logits
        torch.testing.assert_close(
            opened(IDS_BT, attention_mask=torch.ones_like(IDS_BT)).logits, wanted, rtol=0, atol=1e-5
        )
    ids = tokenizer()("the quick brown fox", return_tensors="pt")["input_ids"]
    with TorchRunner(model) as reference:
        (tokens,) = reference.generate(ids.tolist(), max_new_tokens=8)
    pipeline = LLMPipeline(str(tmp_path / "out"), "CPU", **EXACT)
    assert pipeline.generate("the quick brown fox", max_new_tokens=8, ignore_eos=True) == tokenizer().decode(tokens)
    assert openvino.__version__.startswith("202")
