"""The runner of ONNX Runtime, on a graph that is small enough to be computed by hand: sums over all tokens so far."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from llmcompress.errors import CompressError
from llmcompress.runners.base import RUNNERS
from llmcompress.runners.onnxruntime import OnnxRuntimeRunner

CPU = torch.device("cpu")
VOCABULARY, WIDTH = 48, 8
RANDOM = numpy.random.default_rng(0)
TABLE, HEAD = (RANDOM.normal(size=size).astype(numpy.float32) for size in ((VOCABULARY, WIDTH), (WIDTH, VOCABULARY)))
IDS_BT = torch.randint(0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))


def write_model(folder: Path, *, positions: bool) -> None:
    """Logits of a token are the sum of all rows up to it times the head; rows are in the cache."""
    integers = ["input_ids", "attention_mask", *(["position_ids"] if positions else [])]
    past = helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, ["batch_size", 1, "past", WIDTH])
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch_size", name]) for name in integers]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Unsqueeze", ["rows", "one"], ["new"]),
        helper.make_node("Concat", [past.name, "new"], ["present.0.key"], axis=2),
        helper.make_node("CumSum", ["present.0.key", "two"], ["sums"]),
        helper.make_node("Squeeze", ["sums", "one"], ["all"]),
        helper.make_node("Shape", ["input_ids"], ["tokens"], start=1, end=2),
        helper.make_node("Neg", ["tokens"], ["from"]),
        helper.make_node("Slice", ["all", "from", "end", "one"], ["last"]),
        helper.make_node("MatMul", ["last", "head"], ["plain" if positions else "logits"]),
    ]
    if positions:  # they count, so that wrong ones are noticed
        nodes += [
            helper.make_node("Cast", ["position_ids"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["float", "two"], ["column"]),
            helper.make_node("Mul", ["plain", "column"], ["logits"]),
        ]
    numbers = {"one": [1], "two": [2], "end": [2**40], "table": TABLE, "head": HEAD}
    held = [numpy_helper.from_array(numpy.asarray(value), name) for name, value in numbers.items()]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", "tokens", VOCABULARY]),
        helper.make_tensor_value_info("present.0.key", TensorProto.FLOAT, ["batch_size", 1, "whole", WIDTH]),
    ]
    graph = helper.make_graph(nodes, "sums", [*inputs, past], outputs, held)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "model.onnx"
    )
    config = {"model_type": "llama", "vocab_size": VOCABULARY, "max_position_embeddings": 32, "num_attention_heads": 1}
    (folder / "config.json").write_text(json.dumps(config))


def opened(folder: Path) -> OnnxRuntimeRunner:
    runner = RUNNERS["onnxruntime"].open(str(folder), device=CPU, dtype=torch.float32)
    assert isinstance(runner, OnnxRuntimeRunner)
    return runner


def by_hand(ids_BT: torch.Tensor, *, positions: bool) -> torch.Tensor:
    logits_BTV = torch.from_numpy(TABLE)[ids_BT].cumsum(1) @ torch.from_numpy(HEAD)
    return logits_BTV * torch.arange(ids_BT.shape[1])[:, None] if positions else logits_BTV


@pytest.mark.parametrize("positions", [True, False])
def test_logits_and_decoding_with_the_cache_are_those_of_the_whole_sequence(positions: bool, tmp_path: Path) -> None:
    write_model(tmp_path, positions=positions)
    with opened(tmp_path) as runner:
        assert (runner.vocabulary, runner.max_positions, runner.device) == (VOCABULARY, 32, CPU)
        torch.testing.assert_close(runner.logits(IDS_BT), by_hand(IDS_BT, positions=positions))
        whole = IDS_BT
        for new_B in runner.stream(IDS_BT, max_new_tokens=5):
            assert torch.equal(new_B, by_hand(whole, positions=positions)[:, -1].argmax(-1))
            whole = torch.cat([whole, new_B[:, None]], 1)
        assert whole.shape == (2, 11)


def test_prompts_of_other_lengths_get_what_they_get_alone_and_end_before_a_stop(tmp_path: Path) -> None:
    write_model(tmp_path, positions=True)
    prompts = [[5, 9, 4], [8], [6, 5]]
    with opened(tmp_path) as runner:
        found = runner.generate(prompts, max_new_tokens=6)
        assert found == [runner.generate([prompt], max_new_tokens=6)[0] for prompt in prompts]
        stop = found[0][3]
        assert runner.generate(prompts[:1], max_new_tokens=6, stop={stop})[0] == found[0][: found[0].index(stop)]


def test_work_is_counted_from_the_graph(tmp_path: Path) -> None:
    write_model(tmp_path, positions=False)
    with opened(tmp_path) as runner:
        work = runner.work(IDS_BT)
    assert work is not None
    attention = 2 * WIDTH * 6 * 6
    assert work.prefill_flops == 2 * (2 * 6 * WIDTH * VOCABULARY + attention)
    constants = 3 * 8
    assert work.weight_bytes == 4 * WIDTH * VOCABULARY + 2 * 4 * WIDTH + constants
    assert work.cache_bytes == 4 * 2 * 6 * WIDTH


def test_a_folder_without_a_graph_or_with_a_broken_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="there is no model"):
        opened(tmp_path)
    write_model(tmp_path, positions=False)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(CompressError, match="cannot load it") as told:
        opened(tmp_path)
    assert told.value.code == "model.unloadable"
