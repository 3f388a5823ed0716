"""Prompts and padding predict nothing: no logits are computed for them, and the loss and its gradient are the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from llmcompress.training.data.batch import IGNORED, Batch
from llmcompress.training.head import find_head
from llmcompress.training.objectives.base import Objective
from llmcompress.training.objectives.cross_entropy import CrossEntropy
from llmcompress.training.objectives.kl import KL
from llmcompress.training.step import Step
from llmcompress.training.teacher import ModelTeacher
from tests.families import tiny_model, tiny_tokens

FAMILY = "cohere"


@pytest.mark.parametrize("objective", [KL(), CrossEntropy()], ids=["kl", "cross-entropy"])
@pytest.mark.parametrize("prompt", [5, 9], ids=["half", "all but a few"])
def test_only_rows_that_predict_something_have_logits(objective: Objective, prompt: int) -> None:
    ids_BT = tiny_tokens(FAMILY, batch=3)
    targets_BT = torch.cat([ids_BT[:, 1:], torch.full_like(ids_BT[:, :1], IGNORED)], dim=1)
    targets_BT[:, :prompt] = IGNORED
    batch = Batch(ids_BT, targets_BT)
    assert 0 < batch.predicted < 0.8 * ids_BT.numel()
    whole, rows = gradients(objective, batch, with_head=False)
    assert sum(rows) == ids_BT.numel()
    few, rows = gradients(objective, batch, with_head=True)
    assert rows == [len(ids_BT), batch.predicted], "the last positions alone in the model, then what is wanted"
    for one, other in zip(whole, few, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def gradients(objective: Objective, batch: Batch, *, with_head: bool) -> tuple[list[Tensor], list[int]]:
    """The loss and its gradients, and how many rows the head computed at a time."""
    model, teacher = tiny_model(FAMILY, seed=1), ModelTeacher(tiny_model(FAMILY, seed=2), torch.device("cpu"))
    head = find_head(model, batch.ids_BT) if with_head else None
    step, rows = Step(model, copy.deepcopy(objective), teacher, head, list(model.parameters())), list[int]()
    module = model.get_output_embeddings()
    module.register_forward_hook(lambda _, args, output: rows.append(output.shape[:-1].numel()))
    loss = step(batch, 1)
    loss.backward()
    return [loss.detach(), *(each.grad for each in model.parameters() if each.grad is not None)], rows
