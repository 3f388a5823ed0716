"""Objectives on what happens inside: zero for equal models, equal to slow loops, masked; projections are dropped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError
from llmcompress.training.data.base import Windows
from llmcompress.training.data.batch import IGNORED, Batch, Sample, padded
from llmcompress.training.ensemble import EnsembleTeacher
from llmcompress.training.features import AttentionCall, Features, Wanted, observed
from llmcompress.training.loop import train
from llmcompress.training.objectives.activation_maps import ActivationMaps
from llmcompress.training.objectives.attention_relations import AttentionRelations
from llmcompress.training.objectives.combined import Combined
from llmcompress.training.objectives.features import FeatureObjective
from llmcompress.training.objectives.hidden_states import HiddenStates
from llmcompress.training.objectives.kl import KL
from llmcompress.training.objectives.layer_map import layer_pairs
from llmcompress.training.settings import Training
from llmcompress.training.step import Step
from llmcompress.training.teacher import ModelTeacher
from tests.families import tiny_model, tiny_tokens

CPU = torch.device("cpu")
ALL = [
    HiddenStates(layers="uniform"), HiddenStates(distance="cosine"), AttentionRelations(),
    AttentionRelations(heads=2, layers="uniform"), ActivationMaps(factor=1000.0),
]  # fmt: skip


def gqa(seed: int = 0) -> PreTrainedModel:
    """With the attention that a loaded model has; the tiny ones are `eager`."""
    model = tiny_model("llama_gqa", seed=seed)
    model.set_attn_implementation("sdpa")
    return model


def step_loss(objective: FeatureObjective, batch: Batch, *, seed: int) -> Tensor:
    model, teacher = gqa(), ModelTeacher(gqa(seed), CPU)
    objective.begin(model, teacher)
    return Step(model, objective, teacher, None, list(model.parameters()))(batch, 1)


def random_call(seed: int) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, heads, 5, 4, generator=generator).double() for heads in (4, 2, 2))
    return AttentionCall(query, key, value, 0.5)


def a_batch() -> Batch:
    """Two samples of five tokens, some of which predict nothing."""
    targets = torch.tensor([[1, 1, IGNORED, 1, IGNORED], [1, 1, 1, 1, IGNORED]])
    return Batch(torch.zeros(2, 5, dtype=torch.long), targets)


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_equal_models_have_no_distance_and_others_have(objective: FeatureObjective) -> None:
    ids = tiny_tokens("llama_gqa", batch=2)
    batch = padded([Sample(ids[0]), Sample(ids[1, :7])])
    same = step_loss(objective, batch, seed=0)
    same.backward()
    assert abs(float(same.detach())) < 1e-5
    assert float(step_loss(objective, batch, seed=1).detach()) > 1e-3


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_padding_changes_nothing(objective: FeatureObjective) -> None:
    ids = tiny_tokens("llama_gqa", batch=1)[0, :7]
    learned = torch.ones(12, dtype=torch.bool)
    learned[7:] = False
    longer = padded([Sample(torch.cat([ids, ids[:5]]), learned)])
    found, expected = (step_loss(objective, each, seed=1).detach() for each in (longer, padded([Sample(ids)])))
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_relations_equal_a_loop_over_heads_and_tokens() -> None:
    mine, theirs, batch = random_call(0), random_call(1), a_batch()
    found = AttentionRelations(values=0.5).value(Features(attention=[mine]), Features(attention=[theirs]), batch)
    total = 0.0
    for sample in range(2):
        for t in range(5):
            if batch.targets_BT[sample, t] == IGNORED:
                continue
            for one, share in (("attention", 1.0), ("values", 0.5)):
                heads = 4 if one == "attention" else 2
                for head in range(heads):
                    rows = []
                    for call in (mine, theirs):
                        if one == "attention":
                            query, keys = call.query_BHTD[sample, head, t], call.key_BGTD[sample, head // 2, : t + 1]
                        else:
                            query, keys = call.value_BGTD[sample, head, t], call.value_BGTD[sample, head, : t + 1]
                        rows.append((keys @ query * 0.5).softmax(-1))  # ½ is both the scaling and 1/√4
                    q, p = rows
                    total += share * float((p * (p / q).log()).sum()) / heads
    assert float(found) == pytest.approx(total / 7, rel=1e-10)


def test_relation_heads_are_the_joined_channels_split_anew() -> None:
    mine = random_call(0)
    wide = AttentionRelations(heads=1)._between_values(mine)
    joined = mine.value_BGTD.transpose(1, 2).flatten(2)
    scores = joined @ joined.transpose(1, 2) / 8**0.5
    torch.testing.assert_close(wide[:, 0, -1], scores[:, -1].log_softmax(-1))
    with pytest.raises(CompressError) as caught:
        AttentionRelations(heads=3)._between_values(mine)
    assert caught.value.code == "training.heads"


def test_activation_maps_are_the_surveys_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    mine, theirs = (torch.randn(2, 5, width, generator=generator).double() for width in (3, 6))
    batch, total = a_batch(), 0.0
    for sample in range(2):
        kept = batch.targets_BT[sample] != IGNORED
        maps = [each[sample, kept].square().mean(-1) for each in (mine, theirs)]
        total += float((maps[0] / maps[0].norm() - maps[1] / maps[1].norm()).norm())
    found = ActivationMaps().value(Features(hidden=[mine]), Features(hidden=[theirs]), batch)
    assert float(found) == pytest.approx(total / 2, rel=1e-12)


def test_layers_are_mapped_at_equal_steps_or_as_told() -> None:
    assert layer_pairs("uniform", 2, 6) == [(0, 2), (1, 5)]
    assert layer_pairs("last", 2, 6) == [(1, 5)]
    assert layer_pairs({1: 3, 0: 0}, 2, 6) == [(0, 0), (1, 3)]
    with pytest.raises(CompressError, match="do not exist"):
        layer_pairs({2: 0}, 2, 6)


def test_a_projection_is_trained_with_a_narrower_student_and_no_part_of_it() -> None:
    ids = tiny_tokens("llama", batch=8)
    student, teacher = tiny_model("llama"), ModelTeacher(tiny_model("llama_odd"), CPU)
    names = set(student.state_dict())
    assert student.config.hidden_size != teacher.model.config.hidden_size
    objective = HiddenStates()
    before = [each.detach().clone() for each in objective.begin(student, teacher)]
    report = train(
        student, Windows(ids), Training(steps=4, batch=4, learning_rate=1e-2), RunContext(ids), objective=objective,
        teacher=teacher,
    )  # fmt: skip
    after = list(objective._projections.values())
    assert len(before) == len(after) == 1 and not torch.equal(before[0], after[0])
    assert report.losses[-1] < report.losses[0] and set(student.state_dict()) == names


def test_features_are_added_to_a_divergence_of_logits() -> None:
    ids = tiny_tokens("llama", batch=2)
    both = Combined([KL(), HiddenStates(factor=0.5)])
    values = []
    for objective in (both, KL(), HiddenStates(factor=0.5)):
        model, teacher = tiny_model("llama"), ModelTeacher(tiny_model("llama", seed=1), CPU)
        values.append(
            float(Step(model, objective, teacher, None, [])(padded([Sample(row) for row in ids]), 1).detach())
        )
    assert values[0] == pytest.approx(values[1] + values[2], rel=1e-6)


def test_what_is_observed_is_all_blocks_once_and_nothing_stays_attached() -> None:
    model = gqa()
    ids = tiny_tokens("llama_gqa", batch=1)
    with observed(model, Wanted(hidden=True, attention=True)) as features:
        expected = model(ids, output_hidden_states=True).hidden_states
    assert len(features.hidden) == len(features.attention) == len(expected) - 1
    assert torch.equal(features.hidden[0], expected[1])
    model(ids)
    assert len(features.attention) == len(expected) - 1
    model.set_attn_implementation("eager")
    with pytest.raises(CompressError) as caught, observed(model, Wanted(attention=True)):
        model(ids)
    assert caught.value.code == "training.attention"


def test_features_need_one_model_as_the_teacher() -> None:
    teacher = EnsembleTeacher([ModelTeacher(tiny_model("llama", seed=1), CPU)])
    with pytest.raises(CompressError) as caught:
        HiddenStates().begin(tiny_model("llama"), teacher)
    assert caught.value.code == "training.live-teacher"
