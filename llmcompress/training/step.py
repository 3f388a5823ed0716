"""Model and objective as one module, which accelerate prepares, so that every engine sees the whole loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import PreTrainedModel

from llmcompress.model.skeleton import find_blocks
from llmcompress.training.data.batch import Batch
from llmcompress.training.features import observed
from llmcompress.training.head import Head, Predictions, needs_head, predictions, rows_at_once
from llmcompress.training.objectives.base import Objective, ObjectiveInputs
from llmcompress.training.teacher import Teacher


class Step(nn.Module):
    """A batch → the mean of the objective over its tokens. The model stays in the mode (`eval`) that it was in."""

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        teacher: Teacher | None,
        head: Head | None,
        trained: Sequence[nn.Parameter],
    ) -> None:
        super().__init__()
        self.model = model
        inside = {id(each) for each in model.parameters()}
        # gates, angles: trained, and in no module of the model
        self.outside = nn.ParameterList([each for each in trained if id(each) not in inside])
        self._objective, self._teacher, self._head = objective, teacher, [head]  # in a list: it is the model's

    def forward(self, batch: Batch, step: int) -> Tensor:
        """The loss of step 1, 2, …; 0 in validation."""
        vocabulary = self.model.config.get_text_config().vocab_size
        head = self._head[0] if needs_head(batch, vocabulary) else None
        wanted = self._objective.observes()
        asked = self._teacher if self._objective.needs_teacher() else None

        def student() -> Predictions:
            return predictions(self.model, batch, head).cut(asked.vocabulary if asked else None)

        with observed(self.model, wanted) as features:
            predicted = student()
        teacher = asked.predictions(batch, wanted) if asked else None
        most = batch.ids_BT.numel() if head is None else min(rows_at_once(vocabulary), max(batch.predicted, 1))
        return self._objective.loss(ObjectiveInputs(step, batch, predicted, teacher, most, features, student))


@contextmanager
def checkpointed_blocks(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing of every block, for as long as the context lasts.

    Transformers' own switch does nothing in eval mode, and train mode would bring dropout along.
    """
    with ExitStack() as stack:
        for name, block in find_blocks(model) if wanted else []:
            owner, _, index = name.rpartition(".")
            blocks = model.get_submodule(owner)
            setattr(blocks, index, checkpoint_wrapper(block))
            stack.callback(setattr, blocks, index, block)
        yield
