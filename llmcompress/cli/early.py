"""What is wrong with the words of a command, told before PyTorch is imported: seconds earlier, in the same words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmcompress.evaluation.settings.base import MetricSettings


def refuse_missing_models(*models: str) -> None:
    """Whatever cannot be a model: no such folder, no such bundled model, no possible Hub id.

    Raises: CompressError naming the first.
    """
    from llmcompress.loading.source import local_source

    for model in models:
        local_source(model)


def refuse_missing_texts(settings: Iterable[MetricSettings]) -> None:
    """Texts on this computer that are named and not there.

    Raises: CompressError naming the first.
    """
    from llmcompress.calibration.sources import check_source

    for source, where in (each for its in settings for each in its.sources()):
        check_source(source, where=where)


def refuse_mistakes(
    recipe: Path, settings: Sequence[str], *, model: str | None, output: Path | None = None, overwrite: bool = False
) -> None:
    """What a recipe file says wrong by itself; a model, a text or an output that cannot be what it names.

    Raises: CompressError for the first mistake; those of the recipe are listed together.
    """
    from llmcompress.recipe.catalogue import passes_are_imported, written_catalogue
    from llmcompress.recipe.document import read_file
    from llmcompress.storage.folder import check_output
    from llmcompress.storage.paths import from_home

    if passes_are_imported():  # the full check that follows takes no longer
        return
    written = written_catalogue().checked(read_file(recipe), settings)
    name = model or written.model
    if output is not None:
        check_output(output, overwrite=overwrite, source=from_home(name) if name else None)
    if name:
        refuse_missing_models(name)
    refuse_missing_texts(written.evaluate or ())
