"""The runner of OpenVINO: logits, states and the last position, on a small stateful graph that needs no Optimum."""

from __future__ import annotations

import json
from pathlib import Path

import openvino
import pytest
import torch
from torch import nn

from llmcompress.errors import CompressError
from llmcompress.exporters.openvino_surgery import keep_activations, read_graph, write_graph
from llmcompress.runners.base import RUNNERS
from llmcompress.runners.openvino import FILE, OpenVinoRunner
from tests.exporters.openvino_graphs import Sequence, write_sequence
from tests.exporters.test_openvino import coded, table
from tests.families import tiny_config

CPU = torch.device("cpu")
IDS_BT = torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(2))
PROMPTS = [[5, 9, 4, 7], [8], [6, 5]]


@pytest.fixture(scope="module")
def model() -> Sequence:
    return Sequence(table("int8_channel", 50, 64), block=coded("int4_g32", 64, 64), head=nn.Linear(64, 50))


@pytest.fixture(scope="module")
def folder(model: Sequence, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("openvino")
    write_sequence(model, made)
    (made / "config.json").write_text(json.dumps(tiny_config("llama").to_dict()))
    return made


def greedy(model: Sequence, prompt: list[int], count: int) -> list[int]:
    """Every token from the whole text before it."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_logits_texts_and_streams_are_those_of_whole_forwards(model: Sequence, folder: Path) -> None:
    with RUNNERS["openvino"].open(str(folder), device=CPU, dtype=torch.float32) as runner:
        assert (runner.name, runner.vocabulary, runner.max_positions, runner.device) == ("openvino", 50, 128, CPU)
        torch.testing.assert_close(runner.logits(IDS_BT), model(IDS_BT), rtol=0, atol=2e-5)
        wanted = [greedy(model, prompt, 6) for prompt in PROMPTS]
        assert runner.generate(PROMPTS, max_new_tokens=6) == wanted
        stop = wanted[0][2]
        ended = [each[: each.index(stop)] if stop in each else each for each in wanted]
        assert runner.generate(PROMPTS, max_new_tokens=6, stop={stop}) == ended
        steps = torch.stack(list(runner.stream(IDS_BT, max_new_tokens=4)), dim=1)
        assert steps.tolist() == [greedy(model, prompt, 4) for prompt in IDS_BT.tolist()]
        torch.testing.assert_close(runner.logits(IDS_BT[:1]), model(IDS_BT[:1]), rtol=0, atol=2e-5)  # no state is left


def test_a_folder_may_turn_dynamic_quantization_off(folder: Path, tmp_path: Path) -> None:
    graph = read_graph(folder / FILE)
    keep_activations(graph)
    write_graph(graph, tmp_path / FILE)
    core, name = openvino.Core(), "DYNAMIC_QUANTIZATION_GROUP_SIZE"
    for place, rounds in ((folder, True), (tmp_path, False)):
        compiled = core.compile_model(str(place / FILE), "CPU")
        assert (int(compiled.get_property(name)) > 0) == rounds
    asked = core.compile_model(str(tmp_path / FILE), "CPU", {name: "32"})
    assert int(asked.get_property(name)) == 32


def test_work_is_read_from_the_graph(folder: Path) -> None:
    with OpenVinoRunner(folder) as runner:
        found = runner.work(IDS_BT)
    tables = 50 * 64 * 4, 64 * 64 // 2 + 64 * 2 * 2
    assert found.prefill_flops == 2 * 3 * (6 * 64 * 64 + 50 * 64)  # the head multiplies the last position alone
    assert sum(tables) <= found.weight_bytes <= sum(tables) + 64  # and the shape of the groups


def test_its_default_precision_is_near_and_not_the_same(model: Sequence, folder: Path) -> None:
    with RUNNERS["openvino"].open(str(folder), device=CPU, dtype=torch.bfloat16) as runner:
        torch.testing.assert_close(runner.logits(IDS_BT), model(IDS_BT), rtol=0, atol=0.5)


def test_a_folder_without_a_graph_or_with_a_damaged_one_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"no openvino_model.xml"):
        RUNNERS["openvino"].open(str(tmp_path), device=CPU, dtype=torch.float32)
    (tmp_path / "openvino_model.xml").write_text((folder / "openvino_model.xml").read_text()[:500])
    with pytest.raises(CompressError, match="OpenVINO cannot read it") as told:
        RUNNERS["openvino"].open(str(tmp_path), device=CPU, dtype=torch.float32)
    assert told.value.code == "model.unloadable"
