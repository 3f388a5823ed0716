"""Which passes may follow which, and whether their globs mean anything in this model."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import combinations

from llmcompress.errors import CompressError, ExitCode
from llmcompress.passes.base import PASSES, BlockPass
from llmcompress.recipe.document import Document


def check_order(passes: Sequence[BlockPass], site_names: Sequence[str]) -> None:
    """No pass may change the weights of a site that already holds codes.

    Raises: CompressError `recipe.order` naming both passes and the first such site.
    """
    for site in site_names:
        chosen = [(index, each) for index, each in enumerate(passes) if each.selects(site)]
        for (first, earlier), (second, later) in combinations(chosen, 2):
            if earlier.for_site(site).quantizes():
                raise _undone(first, earlier, second, later, where=f"{_label(second, later)}, site {site}")


def check_order_of_globs(passes: Sequence[BlockPass], document: Document) -> None:
    """The same before the model is known: refuse where one pass surely selects sites of the other.

    Raises: CompressError `recipe.order` with the line of the later pass.
    """
    for (first, earlier), (second, later) in combinations(enumerate(passes), 2):
        if _surely_quantizes(earlier) and (_covers(earlier, later) or _covers(later, earlier)):
            where = document.where(("passes", second, PASSES.name_of(type(later))))
            raise _undone(first, earlier, second, later, where=where)


def check_sites(passes: Sequence[BlockPass], site_names: Sequence[str]) -> None:
    """Every glob of every pass matches at least one site, and every pass has sites left.

    Raises: CompressError `recipe.no-such-site` with the nearest names.
    """
    for index, each in enumerate(passes):
        selected = [site for site in site_names if each.selects(site)]
        for key, glob in _globs(each):
            among = selected if key == "overrides" else site_names
            if not any(fnmatchcase(site, glob) for site in among):
                what = f"{key} {glob!r} matches no {'site that the pass works on' if among is selected else 'site'}"
                raise CompressError(
                    "recipe.no-such-site",
                    what,
                    where=f"{_label(index, each)}.{key}",
                    fix=_nearest_sites(glob, among),
                    exit_code=ExitCode.USAGE,
                )
        if not selected:
            raise CompressError(
                "recipe.no-such-site",
                "`exclude` leaves the pass no site to work on",
                where=_label(index, each),
                fix="exclude less, or remove the pass",
                exit_code=ExitCode.USAGE,
            )


def _globs(each: BlockPass) -> Iterator[tuple[str, str]]:
    for key, globs in (("sites", each.sites), ("exclude", each.exclude), ("overrides", each.overrides)):
        yield from ((key, glob) for glob in globs)


def _nearest_sites(glob: str, site_names: Sequence[str]) -> str:
    """Globs like the one written that would match."""
    words = {".".join(site.split(".")[-count:]) for site in site_names for count in (1, 2)}
    near = difflib.get_close_matches(glob.strip("*."), sorted(words), n=3, cutoff=0.5)
    shown = near or sorted({site.rpartition(".")[2] for site in site_names})[:12]
    return f"{'did you mean' if near else 'sites end in'} {', '.join(f'`*.{word}`' for word in shown)}?"


def _surely_quantizes(each: BlockPass) -> bool:
    """Whether every selected site holds codes afterwards, whatever the overrides do."""
    return each.quantizes() and all(each.model_copy(update=changed).quantizes() for changed in each.overrides.values())


def _covers(wide: BlockPass, narrow: BlockPass) -> bool:
    """True when `wide` surely selects everything that some glob of `narrow` selects."""
    shared = "*" in wide.sites or set(wide.sites) & set(narrow.sites)
    return bool(shared) and set(wide.exclude) <= set(narrow.exclude)


def _undone(first: int, earlier: BlockPass, second: int, later: BlockPass, *, where: str) -> CompressError:
    one, two = PASSES.name_of(type(earlier)), PASSES.name_of(type(later))
    if _rounds_by_choice(earlier):
        fix = f"write `{one}: {{round: false}}`: it then only scales, and {two} rounds"
    elif _rounds_by_choice(later):
        fix = f"put `{two}: {{round: false}}` before {one}"
    elif not later.quantizes():
        fix = f"put {two} before {one}"
    else:
        fix = "keep one of the two, or give them different `sites`"
    return CompressError(
        "recipe.order",
        f"{_label(second, later)} would change weights that {_label(first, earlier)} has already turned into codes",
        where=where,
        fix=fix,
        exit_code=ExitCode.USAGE,
    )


def _rounds_by_choice(each: BlockPass) -> bool:
    """Whether the pass can leave rounding to another."""
    return "round" in type(each).model_fields and not each.model_copy(update={"round": False}).quantizes()


def _label(index: int, each: BlockPass) -> str:
    return f"passes.{index}.{PASSES.name_of(type(each))}"
