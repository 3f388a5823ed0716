"""From the options of a pass to its teacher: a model by name, several of them, or what is stored of one."""

from __future__ import annotations

from collections.abc import Sequence

from llmcompress.calibration.whole import WholeModel
from llmcompress.training.ensemble import EnsembleTeacher, Gate
from llmcompress.training.teacher import ModelTeacher, Teacher
from llmcompress.training.teacher_store import Stored, TeacherStore


def named_teacher(whole: WholeModel, name: str) -> ModelTeacher:
    """Loaded at its first use; cut to the smaller vocabulary where two are padded to different sizes.

    Raises: CompressError where there is no such model.
    """
    context, sizes = whole.context, {whole.model.config.get_text_config().vocab_size}
    sizes.add(context.teachers.vocabulary(name))
    vocabulary = min(sizes) if len(sizes) > 1 else None
    return ModelTeacher(lambda: context.teachers.model(name), context.device, vocabulary=vocabulary)


def ensemble(whole: WholeModel, names: Sequence[str], *, weights: Sequence[float], gate: Gate) -> Teacher:
    """One teacher as it is, several as a mixture.

    Raises: CompressError where one does not exist.
    """
    each = [named_teacher(whole, name) for name in names]
    return each[0] if len(each) == 1 else EnsembleTeacher(each, weights=weights, gate=gate)


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
