"""Recovery: a short training after pruning or factorization; zeros stay zero and shapes stay the same."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.passes.base import PASSES
from llmcompress.passes.retraining import Lesson, Retraining
from llmcompress.passes.teaching import named_teacher
from llmcompress.training.data.base import IndexedSamples
from llmcompress.training.objectives.kl import KL


@PASSES.register("recover")
class Recover(Retraining):
    """Train the compressed model on the calibration text: all weights, or LoRA adapters.

    Adapters are merged into dense weights without changing a zero. On quantized weights they stay as a low-rank branch,
    and the codes do not change. With a teacher the loss is forward KL to it; `distill` has the other objectives.

    Source: Hu et al., arXiv 2106.09685 (adapters); Ma et al., arXiv 2305.11627, section 3.3 (after pruning); Dettmers
    et al., arXiv 2305.14314 (with quantized weights). Differs: adapters are masked, so merging keeps the sparsity.
    """

    title: ClassVar[str] = "recover"

    teacher: str | None = Field(
        None,
        min_length=1,
        description="`original` (the model before compression), a Hub id or a folder with the same tokenizer; null: "
        "learn from the text alone",
    )

    @override
    def teachers(self) -> tuple[str, ...]:
        return () if self.teacher is None else (self.teacher,)

    @override
    def lesson(self, whole: WholeModel, data: IndexedSamples) -> Lesson:
        if self.teacher is None:
            return Lesson()
        return Lesson(KL(), named_teacher(whole, self.teacher, self.teacher_dtype))
