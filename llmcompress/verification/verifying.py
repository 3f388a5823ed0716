"""`verify`: whether a saved model is what was written, complete, finite, and what its report says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmcompress.errors import CompressError, ExitCode
from llmcompress.loading.source import local_source
from llmcompress.records.verification import Check, Verification
from llmcompress.storage.names import FILES
from llmcompress.storage.paths import from_home
from llmcompress.verification import provenance, reloading, stored
from llmcompress.verification.published import published_folder
from llmcompress.verification.reloading import FreshProcess, in_fresh_process

CHECKS: tuple[Callable[[Path], Check], ...] = (
    stored.files,
    stored.tensors,
    stored.finite,
    provenance.recipe,
    provenance.export,
    provenance.origin,
)
"""In this order; each says why it was not made, where it was not."""


def verify(model: str | Path, *, deep: bool = False) -> Verification:
    """Check a folder that llmcompress wrote, or a repository of the Hub that it published, with every format in it.

    Digests of all files, names and shapes of all tensors against config.json, NaN and Inf, recipe against report, and
    where the model came from. `deep` also loads it in a fresh process and compares its logits with those of the stored
    codes (of an export: its perplexity with that of the export report).

    Raises: CompressError when there is no such model. What does not hold is in the result.
    """
    name = str(model)
    folder = from_home(name)
    if not folder.is_dir():
        found = local_source(name)
        folder = found.folder if found is not None else published_folder(name)
    return verified_whole(folder, name=name, deep=deep)


def verified_whole(
    folder: Path, *, name: str, deep: bool = False, fresh: FreshProcess = in_fresh_process
) -> Verification:
    """A folder and the formats below it: `onnx/` of a repository that was published with several."""
    below = sorted(path.parent for path in folder.glob(f"*/{FILES}"))
    alone = not below or (folder / FILES).is_file()
    checks = verified(folder, name=name, deep=deep, fresh=fresh).checks if alone else ()
    for part in below:
        found = verified(part, name=name, deep=deep, fresh=fresh).checks
        checks = (*checks, *(each.model_copy(update={"folder": part.name}) for each in found))
    return Verification(model=name, checks=checks)


def verified(folder: Path, *, name: str, deep: bool = False, fresh: FreshProcess = in_fresh_process) -> Verification:
    """The same of one folder by itself; `fresh` runs a program in another process."""
    checks = [_made(check, folder) for check in CHECKS]
    if deep:
        checks.append(_made(lambda place: reloading.logits(place, fresh), folder, name="reload"))
    return Verification(model=name, checks=tuple(checks))


def failure_of(found: Verification, *, saved: str) -> CompressError | None:
    """What does not hold, as an error of exit code 6; None: everything that was checked does."""
    if not found.failed:
        return None
    first = found.failed[0]
    return CompressError(
        "verify.failed",
        "; ".join(f"{each.title}: {each.found}" for each in found.failed),
        where=", ".join(f"{first.folder}/{place}".lstrip("/") for place in first.where[:5]),
        fix="compress or export the model again, or download it again; do not use or publish this folder",
        saved=saved,
        exit_code=ExitCode.GATE,
    )


def _made(check: Callable[[Path], Check], folder: Path, *, name: str | None = None) -> Check:
    """What cannot be read at all does not hold either."""
    try:
        return check(folder)
    except CompressError as problem:
        where = (problem.where,) if problem.where else ()
        return Check(name=name or check.__name__, result="failed", found=problem.what, where=where)
