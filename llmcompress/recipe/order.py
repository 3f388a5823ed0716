"""Which passes may follow which, and whether their globs match anything in this model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

from llmcompress.errors import CompressError, ExitCode, near_names
from llmcompress.passes.base import PASSES, BlockPass, Pass, Trait
from llmcompress.passes.globs import matches
from llmcompress.recipe.document import Document


def check_order(passes: Sequence[Pass], site_names: Sequence[str]) -> None:
    """Check that no pass undoes the work of an earlier one on the same site.

    Raises: CompressError `recipe.order` naming both passes, the reason and the first such site.
    """
    for site in site_names:
        before: list[tuple[int, Pass, frozenset[Trait]]] = []
        for index, (each, names) in enumerate(zip(passes, _names_by_pass(passes, site), strict=True)):
            chosen = [name for name in names if each.selects(name)]
            if not chosen:
                continue
            for first, earlier, traits in before:
                reason = _reason(traits, each.for_site(chosen[0]))
                if reason:
                    raise _undone(first, earlier, index, each, reason, where=f"{_label(index, each)}, site {chosen[0]}")
            together = frozenset[Trait]().union(*(traits for _, _, traits in before))
            if before and (reason := each.for_site(chosen[0]).conflict_with_all(together)):
                first, earlier, _ = before[-1]
                raise _undone(first, earlier, index, each, reason, where=f"{_label(index, each)}, site {chosen[0]}")
            before.append((index, each, each.for_site(chosen[0]).traits()))
    for (first, earlier), (second, later) in combinations(enumerate(passes), 2):
        reason = _reason(earlier.traits() & {"tables"}, later)  # which no site has
        if reason:
            raise _undone(first, earlier, second, later, reason, where=_label(second, later))


def check_order_of_globs(passes: Sequence[Pass], document: Document) -> None:
    """The same before the model is known: refuse where one pass surely selects sites of the other.

    Raises: CompressError `recipe.order` with the line of the later pass.
    """
    for (first, earlier), (second, later) in combinations(enumerate(passes), 2):
        reason = _reason(_sure_traits(earlier), later)
        if reason and (_covers(earlier, later) or _covers(later, earlier)):
            where = document.where(("passes", second, PASSES.name_of(type(later))))
            raise _undone(first, earlier, second, later, reason, where=where)


def check_sites(passes: Sequence[Pass], site_names: Sequence[str]) -> None:
    """Check that every glob of every pass matches a site, and that every pass has sites.

    Raises: CompressError `recipe.no-such-site` with the nearest names.
    """
    by_site = [_names_by_pass(passes, site) for site in site_names]
    for index, each in enumerate(passes):
        if not isinstance(each, BlockPass):
            continue
        names = [name for of_site in by_site for name in of_site[index]]
        selected = [name for name in names if each.selects(name)]
        for key, glob in _globs(each):
            among = selected if key == "overrides" else names
            if not any(matches(site, glob) for site in among):
                what = f"{key} {glob!r} matches no {'site that the pass selects' if among is selected else 'site'}"
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
                "`exclude` removes every site that `sites` selects",
                where=_label(index, each),
                fix="exclude fewer sites, or remove the pass",
                exit_code=ExitCode.USAGE,
            )


def _names_by_pass(passes: Sequence[Pass], site: str) -> list[tuple[str, ...]]:
    """The linears at an original site when each pass begins: itself, or the factors from an earlier pass."""
    names: tuple[str, ...] = (site,)
    found = []
    for each in passes:
        found.append(names)
        names = tuple(after for name in names for after in (each.names_after(name) if each.selects(name) else (name,)))
    return found


def _reason(traits: Iterable[Trait], later: Pass) -> str | None:
    return next((reason for trait in sorted(traits) if (reason := later.conflict_with(trait))), None)


def _globs(each: BlockPass) -> Iterator[tuple[str, str]]:
    for key, globs in (("sites", each.sites), ("exclude", each.exclude), ("overrides", each.overrides)):
        yield from ((key, glob) for glob in globs)


def _nearest_sites(glob: str, site_names: Sequence[str]) -> str:
    """Globs like the one written that would match."""
    words = {".".join(site.split(".")[-count:]) for site in site_names for count in (1, 2)}
    near = near_names(glob.strip("*."), sorted(words), count=3)
    shown = near or sorted({site.rpartition(".")[2] for site in site_names})[:12]
    return f"{'did you mean' if near else 'sites end in'} {', '.join(f'`*.{word}`' for word in shown)}?"


def _sure_traits(each: Pass) -> frozenset[Trait]:
    """Traits that every selected site has afterwards, with any overrides."""
    changed = each.overrides.values() if isinstance(each, BlockPass) else ()
    return each.traits().intersection(*(each.model_copy(update=options).traits() for options in changed))


def _covers(wide: Pass, narrow: Pass) -> bool:
    """True when `wide` surely selects everything that some glob of `narrow` selects."""
    if not isinstance(wide, BlockPass):
        return True
    others = set(narrow.sites) if isinstance(narrow, BlockPass) else {"*"}
    left_out = set(narrow.exclude) if isinstance(narrow, BlockPass) else set[str]()
    shared = "*" in wide.sites or set(wide.sites) & others
    return bool(shared) and set(wide.exclude) <= left_out


def _undone(first: int, earlier: Pass, second: int, later: Pass, reason: str, *, where: str) -> CompressError:
    one, two = PASSES.name_of(type(earlier)), PASSES.name_of(type(later))
    if _rounds_by_choice(earlier):
        fix = f"write `{one}: {{round: false}}`, so that it only scales and {two} rounds"
    elif _rounds_by_choice(later):
        fix = f"put `{two}: {{round: false}}` before {one}"
    elif _reason(later.traits(), earlier) is None:
        fix = f"put {two} before {one}"
    else:
        fix = "remove one of the two, or give them different `sites`"
    return CompressError(
        "recipe.order",
        f"{_label(second, later)} cannot follow {_label(first, earlier)}: it {reason}",
        where=where,
        fix=fix,
        exit_code=ExitCode.USAGE,
    )


def _rounds_by_choice(each: Pass) -> bool:
    """Whether the pass can leave rounding to another."""
    return "round" in type(each).model_fields and not each.model_copy(update={"round": False}).quantizes()


def _label(index: int, each: Pass) -> str:
    return f"passes.{index}.{PASSES.name_of(type(each))}"
