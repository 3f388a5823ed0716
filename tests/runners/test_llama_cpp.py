"""llama.cpp computes from our files what PyTorch computes, for every architecture, and reads the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmcompress.errors import CompressError
from llmcompress.exporters.contents import contents_in
from llmcompress.exporters.gguf import GgufExporter
from llmcompress.runners.base import RUNNERS
from llmcompress.runners.llama_cpp import LlamaCppRunner
from llmcompress.runners.torch_runner import TorchRunner
from tests.exporters.gguf_models import MODELS, tiny, tiny_quantized, tokenizer, written
from tests.exporters.quantized import quantize

CPU = torch.device("cpu")
IDS_BT = torch.randint(3, 280, (2, 40), generator=torch.Generator().manual_seed(0))


def opened(folder: Path) -> LlamaCppRunner:
    runner = RUNNERS["llama_cpp"].open(str(folder), device=CPU, dtype=torch.float32)
    assert isinstance(runner, LlamaCppRunner)
    return runner


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_dense_file_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    """Keys and values in float16 are all that is rounded; logits have a standard deviation of about 1."""
    model = tiny(name)
    written(model, tmp_path, dtype=torch.float32)
    with opened(tmp_path) as runner, TorchRunner(model) as reference:
        assert (runner.vocabulary, runner.max_positions) == (288, 128)
        torch.testing.assert_close(runner.logits(IDS_BT), reference.logits(IDS_BT), rtol=0, atol=0.02)


def test_codes_compute_the_same_up_to_activations_of_8_bits(tmp_path: Path) -> None:
    model = tiny_quantized("llama")
    written(model, tmp_path)
    with opened(tmp_path) as runner, TorchRunner(model) as reference:
        torch.testing.assert_close(runner.logits(IDS_BT), reference.logits(IDS_BT), rtol=0, atol=0.3)


def test_k_quants_compute_the_same_up_to_activations_of_8_bits(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model = tiny_quantized("llama", [*(f"q{bits}_k" for bits in range(2, 7)), "ternary_g256"], **sizes)
    written(model, tmp_path, exporter=GgufExporter(ternary="TQ1_0"))
    with opened(tmp_path) as runner, TorchRunner(model) as reference:
        torch.testing.assert_close(runner.logits(IDS_BT), reference.logits(IDS_BT), rtol=0, atol=0.3)


def test_prompts_streams_and_stops_are_those_of_the_torch_runner(tmp_path: Path) -> None:
    model = tiny("llama")
    written(model, tmp_path, dtype=torch.float32)
    prompts = [[5, 9, 4, 7, 11, 3], [8], [6, 5, 4]]
    with opened(tmp_path) as runner, TorchRunner(model) as reference:
        wanted = reference.generate(prompts, max_new_tokens=6)
        assert runner.generate(prompts, max_new_tokens=6) == wanted
        stop = {wanted[0][2]}
        assert runner.generate(prompts, max_new_tokens=6, stop=stop) == reference.generate(
            prompts, max_new_tokens=6, stop=stop
        )
        for ids_BT in (IDS_BT, IDS_BT[:1]):
            steps = list(runner.stream(ids_BT, max_new_tokens=4))
            assert torch.equal(torch.stack(steps, 1), torch.stack(list(reference.stream(ids_BT, max_new_tokens=4)), 1))
        assert torch.equal(runner.logits(IDS_BT[:1])[0], runner.logits(IDS_BT)[0])  # nothing of a stream is left


def test_texts_become_the_same_tokens(tmp_path: Path) -> None:
    written(tiny_quantized("llama"), tmp_path)
    ours = tokenizer()
    texts = ["the quick brown fox", " two  spaces, digits 2024 and é ü 你好", "line\n\nline</s>", "it's I'LL don't"]
    with opened(tmp_path) as runner:
        assert [runner.tokenize(text) for text in texts] == [ours(text)["input_ids"] for text in texts]


def test_what_llama_cpp_says_of_a_file_is_told(tmp_path: Path) -> None:
    written(tiny_quantized("llama"), tmp_path)
    file = tmp_path / "model.gguf"
    file.write_bytes(file.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"))
    with pytest.raises(CompressError, match=r"missing tensor 'blk.1.attn_q.weight'") as told:
        opened(tmp_path)
    assert told.value.code == "model.unloadable"
    with pytest.raises(CompressError, match="no GGUF file"):
        opened(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["llama", "llama_tied_biased", "qwen3"])
def test_work_is_what_pytorch_reads_and_computes_with_the_same_weights(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    written(model, tmp_path, dtype=torch.float32)
    with opened(tmp_path) as runner, TorchRunner(model) as reference:
        found, wanted = runner.work(IDS_BT), reference.work(IDS_BT)
    assert found is not None
    rotary = model.model.rotary_emb.inv_freq.nbytes  # llama.cpp computes it
    looked_up = IDS_BT.shape[0] * 64 * 4 if model.config.tie_word_embeddings else 0  # rows of a table read anyway
    assert found.weight_bytes == wanted.weight_bytes - rotary - looked_up
    assert 2 * found.cache_bytes == wanted.cache_bytes  # float16 there, float32 here
    assert found.prefill_flops == wanted.prefill_flops


@pytest.mark.parametrize(("schemes", "blocks"), [(None, 1), (None, 2), (["int8_channel"], 1)])
def test_blocks_of_other_widths_compute_the_same(schemes: list[str] | None, blocks: int, tmp_path: Path) -> None:
    """llama.cpp's `deci` is the graph of Llama with a list for every width; where all are alike, it is `llama`."""
    model = tiny("llama")
    for layer in model.model.layers[:blocks]:
        attention, ffn = layer.self_attn, layer.mlp
        for linear, outputs in ((attention.q_proj, 32), (attention.k_proj, 16), (attention.v_proj, 16)):
            keep(linear, outputs)
        keep(ffn.gate_proj, 64), keep(ffn.up_proj, 64)
        keep(attention.o_proj, 32, columns=True), keep(ffn.down_proj, 64, columns=True)
    if schemes:
        quantize(model, schemes)
    exporter = GgufExporter()
    assert exporter.problem(contents_in(model, torch.float32)) is None
    rows = exporter.read_back(model, tmp_path, written(model, tmp_path, dtype=torch.float32, exporter=exporter))
    assert all(row.is_same for row in rows)
    with opened(tmp_path) as runner, TorchRunner(model) as reference:
        tolerance = 0.3 if schemes else 0.02
        torch.testing.assert_close(runner.logits(IDS_BT), reference.logits(IDS_BT), rtol=0, atol=tolerance)
        work = runner.work(IDS_BT)
        assert work is not None and work.prefill_flops == reference.work(IDS_BT).prefill_flops


def test_other_widths_than_llamas_are_refused() -> None:
    model = tiny("qwen2")
    keep(model.model.layers[0].mlp.gate_proj, 64)
    assert "no graph" in (GgufExporter().problem(contents_in(model, torch.bfloat16)) or "")


def keep(linear: torch.nn.Linear, count: int, *, columns: bool = False) -> None:
    """The first outputs of a linear, or its first inputs."""
    weight_OI = linear.weight.data[:, :count] if columns else linear.weight.data[:count]
    linear.weight = torch.nn.Parameter(weight_OI.clone())
    linear.out_features, linear.in_features = linear.weight.shape
