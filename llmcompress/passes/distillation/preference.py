"""Preference learning: of two answers to a prompt, the one that the teacher liked better becomes more likely."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch.optim import Optimizer
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.calibration.context import ExampleRows
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.loading.quiet import quiet_transformers
from llmcompress.passes.base import PASSES, Backward, ModelPass
from llmcompress.passes.pruning.sparse import sparsity
from llmcompress.records.rows import SiteReport
from llmcompress.training.engine import accelerate_state_apart
from llmcompress.training.masks import ZerosStay

_COLUMNS = ("prompt", "chosen", "rejected")


@PASSES.register("preference")
class Preference(ModelPass):
    """Direct preference optimization (DPO) on prompts with a chosen and a rejected answer, by TRL.

    The rows come from the recipe's `data` steps, usually `rank`, in which a teacher ranks answers. The reference is the
    model before this pass. All weights are trained; zeros stay zero.

    Source: Rafailov et al., arXiv 2305.18290, equation 7; Tunstall et al., arXiv 2310.16944, section 3.3 (Zephyr: β
    0.1, learning rate 5e-7).
    """

    learns_from_examples: ClassVar[bool] = True
    needs_examples: ClassVar[bool] = True

    beta: float = Field(0.1, gt=0, description="strength of the tie to the model before this pass; 0.1 is Zephyr's")
    loss: Literal["sigmoid", "ipo", "hinge"] = Field("sigmoid", description="the loss: DPO's, IPO's or SLiC's")
    steps: int = Field(100, ge=1, description="optimizer steps")
    batch: int = Field(8, ge=1, description="pairs per step")
    learning_rate: float = Field(5e-7, gt=0, description="peak learning rate, after a linear warm-up")
    warmup: float = Field(0.1, ge=0, lt=1, description="fraction of the steps in which the learning rate rises")
    save_every: int = Field(
        100, ge=1, description="steps between two saves of the state from which an interrupted run resumes"
    )

    @override
    def check_packages(self) -> None:
        try:
            import trl  # noqa: F401
        except ImportError as problem:
            raise CompressError(
                "preference.not-installed",
                f"preferences are learned by TRL, which cannot be imported ({problem})",
                where="preference",
                fix='pip install "llmcompress[preference]"',
            ) from None

    @override
    def uses_data(self) -> bool:
        return False

    @override
    def backward(self) -> Backward | None:
        return Backward(of_all=4, windows=2 * self.batch, trained_on=2 * self.batch * self.steps)

    @override
    def apply(self, whole: WholeModel) -> list[SiteReport]:
        given = whole.context.examples
        assert given is not None, "a recipe without `data` is refused"
        rows = _pairs(given)
        reference = copy.deepcopy(whole.model).requires_grad_(False)  # before the model is on its device: TRL moves it
        keep = whole.context.keep
        folder = keep.training_file(whole.context.stage, "preference").with_suffix("") if keep else None
        with whole.resident() as model, as_it_was(model), tempfile.TemporaryDirectory() as scratch:
            self._train(whole, reference, rows, given, kept=folder, scratch=Path(scratch))
        return [
            SiteReport(site=site.name, algorithm="preference", sparsity=sparsity(site.weight_OI))
            for site in whole.sites()
        ]

    def _train(
        self,
        whole: WholeModel,
        reference: PreTrainedModel,
        rows: Sequence[Mapping[str, str]],
        given: ExampleRows,
        *,
        kept: Path | None,
        scratch: Path,
    ) -> None:
        """TRL's trainer, which logs and evaluates nothing; `kept`: where its state is saved."""
        import datasets
        from transformers.trainer_callback import PrinterCallback
        from trl import DPOConfig

        from llmcompress.training.trainer_checkpoints import Checkpoints, ResumableDPO

        whole.model.requires_grad_(True)
        settings = DPOConfig(
            output_dir=str(kept or scratch),
            beta=self.beta,
            loss_type=[self.loss],
            max_steps=self.steps,
            per_device_train_batch_size=self.batch,
            learning_rate=self.learning_rate,
            warmup_steps=round(self.warmup * self.steps),
            max_length=given.tokens,
            seed=whole.context.seed,
            use_cpu=whole.context.device.type == "cpu",
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        states = Checkpoints(kept, every=self.save_every, title="preference", progress=whole.context.progress)
        trainer = ResumableDPO(
            model=whole.model,
            ref_model=reference,
            args=settings,
            train_dataset=datasets.Dataset.from_list(list(rows)),
            processing_class=copy.deepcopy(given.tokenizer),
            callbacks=[_zeros_stay(whole), states],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=states.latest())


@contextmanager
def as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """A trainer of TRL replaces the model's `forward`, changes its configs, seeds all generators and prints.

    Afterwards all of this is as before, and the model in eval mode.
    """
    attributes = set(vars(model))
    configs = [(each, copy.deepcopy(vars(each))) for each in (model.config, model.generation_config) if each]
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with quiet_transformers(), accelerate_state_apart(), torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for each, values in configs:
            vars(each).clear()
            vars(each).update(values)
        model.eval()


def _pairs(given: ExampleRows) -> list[dict[str, str]]:
    """Raises: CompressError for rows without two answers."""
    missing = next((name for row in given.rows for name in _COLUMNS if not isinstance(row.get(name), str)), None)
    if missing:
        raise CompressError(
            "data.columns",
            f"preferences need rows with {', '.join(_COLUMNS)}, and a row has no {missing!r}",
            where="data",
            fix="end `data` with the step `rank`, or read such rows",
        )
    return [{name: row[name] for name in _COLUMNS} for row in given.rows]


def _zeros_stay(whole: WholeModel) -> Any:
    """Zeros of matrices stay zero, as in every other training."""
    from transformers import TrainerCallback

    masks = ZerosStay(whole.model.parameters())

    class Zeros(TrainerCallback):  # type: ignore[misc]
        """Called by the trainer around every optimizer step."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            masks.before_step(state.global_step + 1, _optimizer(given))

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            masks.after_step(state.global_step + 1, _optimizer(given))

    return Zeros()


def _optimizer(given: Mapping[str, Any]) -> Optimizer:
    found: Optimizer = given["optimizer"]
    return found
