"""From the options of a pass to its teacher: a model by name, several of them, or what is stored of one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmcompress.calibration.whole import WholeModel
from llmcompress.loading.teachers import ORIGINAL
from llmcompress.training.data.base import IndexedSamples
from llmcompress.training.data.batch import padded
from llmcompress.training.ensemble import EnsembleTeacher, Gate, calibration_error
from llmcompress.training.other_vocabulary import Mapping, OtherVocabularyTeacher
from llmcompress.training.teacher import ModelTeacher, Teacher
from llmcompress.training.teacher_store import Stored, TeacherStore
from llmcompress.training.text_alignment import Pair

_JUDGED = 16
"""Samples on which the calibration of teachers is measured."""


def named_teacher(whole: WholeModel, name: str, dtype: torch.dtype = torch.float32) -> ModelTeacher:
    """Loaded at its first use; cut to the smaller vocabulary where two are padded to different sizes.

    Raises: CompressError where there is no such model.
    """
    context, sizes = whole.context, {whole.model.config.get_text_config().vocab_size}
    sizes.add(context.teachers.vocabulary(name))
    vocabulary = min(sizes) if len(sizes) > 1 else None
    return ModelTeacher(lambda: context.teachers.model(name, dtype), context.device, vocabulary=vocabulary)


def teacher_of_other_vocabulary(
    whole: WholeModel, name: str, mapping: Mapping, *, temperature: float, dtype: torch.dtype
) -> Teacher:
    """A teacher with its own tokenizer.

    Raises: CompressError where there is no such model.
    """
    context = whole.context
    pair = Pair(context.teachers.tokenizer(ORIGINAL), context.teachers.tokenizer(name))
    model = ModelTeacher(lambda: context.teachers.model(name, dtype), context.device)
    return OtherVocabularyTeacher(model, pair, mapping, temperature=temperature)


def ensemble(
    whole: WholeModel, names: Sequence[str], *, weights: Sequence[float], gate: Gate, dtype: torch.dtype
) -> Teacher:
    """One teacher as it is, several as a mixture.

    Raises: CompressError where one does not exist.
    """
    each = [named_teacher(whole, name, dtype) for name in names]
    return each[0] if len(each) == 1 else EnsembleTeacher(each, weights=weights, gate=gate)


def tell_calibration(whole: WholeModel, names: Sequence[str], mixture: EnsembleTeacher, data: IndexedSamples) -> None:
    """A note: the calibration error of the mixture and of each teacher on the first samples of the training data."""
    batch = padded([data.sample(index) for index in range(min(data.count, _JUDGED))]).to(whole.context.device)
    each = {name: calibration_error(teacher, batch) for name, teacher in zip(names, mixture.members, strict=True)}
    told = ", ".join(f"{name} {error:.4f}" for name, error in each.items())
    whole.context.progress.note(
        f"expected calibration error on {batch.predicted} tokens of the training data: mixture of the teachers "
        f"{calibration_error(mixture, batch):.4f}; {told}"
    )


def store_of(whole: WholeModel, name: str, settings: Stored, *, temperature: float) -> TeacherStore:
    """Where the teacher of that name is stored.

    Raises: CompressError where there is no such model.
    """
    context = whole.context
    size = min(whole.model.config.get_text_config().vocab_size, context.teachers.vocabulary(name))
    return TeacherStore(
        settings=settings,
        vocabulary=size,
        temperature=temperature,
        seed=context.seed,
        about=context.teachers.identity(name),
        device=context.device,
        progress=context.progress,
    )
