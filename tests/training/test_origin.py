"""What a pruned model was made from is found again: its blocks after `depth`, its heads after `width`."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES
from llmcompress.training.objectives.attention_relations import AttentionRelations
from llmcompress.training.objectives.hidden_states import HiddenStates
from llmcompress.training.origin import increasing, kept_blocks, kept_heads
from llmcompress.training.teacher import ModelTeacher

IDS = torch.randint(3, 97, (8, 16), generator=torch.Generator().manual_seed(0))


def dense() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=5, vocab_size=97)).eval()
    model.set_attn_implementation("sdpa")
    for each in model.parameters():
        torch.nn.init.normal_(each, std=0.2)
    return model


def made(*named: tuple[str, dict[str, object]]) -> PreTrainedModel:
    model = dense()
    return apply_passes(
        model, map_model(model), [PASSES[name](**options) for name, options in named], RunContext(IDS)
    ).model


@pytest.mark.parametrize("drop", [(1,), (0, 3)], ids=str)
def test_blocks_that_were_kept_are_found_again(drop: tuple[int, ...]) -> None:
    student = made(("depth", {"blocks": list(drop)}), ("width", {"fraction": 0.25, "refit": "none"}))
    kept = [index for index in range(5) if index not in drop]
    assert kept_blocks(student, dense()) == dict(enumerate(kept))


def test_heads_that_were_kept_are_found_again() -> None:
    teacher = dense()
    torch.manual_seed(1)
    values = torch.randn(2, 4, 6, 8)
    for kept in combinations(range(4), 2):
        assert kept_heads(values[:, list(kept)] + 0.3 * torch.randn(2, 2, 6, 8), values) == list(kept)
    student = made(("width", {"fraction": 0.5, "refit": "none"}))
    heads = student.config.num_key_value_heads
    assert heads < 4
    objective = AttentionRelations(heads="kept", layers="uniform")
    objective.begin(student, ModelTeacher(teacher, torch.device("cpu")))
    for layer, found in objective._heads.items():
        mine = student.model.layers[layer].self_attn.v_proj.weight.view(heads, 4, 32)
        theirs = teacher.model.layers[layer].self_attn.v_proj.weight.view(4, 4, 32)
        assert torch.equal(mine, theirs[found])


def test_the_cheapest_increasing_map_is_that_of_a_search_through_all() -> None:
    for seed in range(5):
        cost = torch.rand(3, 6, generator=torch.Generator().manual_seed(seed))
        all_of_them = {
            way: float(sum(cost[row, column] for row, column in enumerate(way))) for way in combinations(range(6), 3)
        }
        assert tuple(increasing(cost, what="x")) == min(all_of_them, key=all_of_them.__getitem__)
    with pytest.raises(CompressError, match="3 x and the teacher 2"):
        increasing(torch.rand(3, 2), what="x")


def test_a_student_of_another_origin_is_refused() -> None:
    other = dense()
    for each in other.parameters():
        torch.nn.init.normal_(each, std=0.1)
    with pytest.raises(CompressError) as caught:
        HiddenStates(layers="kept").begin(other, ModelTeacher(dense(), torch.device("cpu")))
    assert caught.value.code == "training.origin"


def test_kept_layers_are_compared_with_what_they_were() -> None:
    student = made(("depth", {"blocks": [1]}))
    objective = HiddenStates(layers="kept")
    objective.begin(student, ModelTeacher(dense(), torch.device("cpu")))
    assert objective.numbers(4, 5) == [(0, 0), (1, 2), (2, 3), (3, 4)]
