"""Takes the names of places on this computer out of recipe and reports before they are published."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any

_PLACE = re.compile(r"[/~]|\.{1,2}/|[A-Za-z]:\\|\\\\")


def places_in(values: Any) -> list[str]:
    """Every text in data (of a recipe, say) that is a path on this computer; keys and sentences are none."""
    return list(dict.fromkeys(text for text in _texts(values) if _is_place(text)))


def public_names(places: Iterable[str], *, known: Mapping[str, str]) -> dict[str, str]:
    """Place → what is published instead: what is `known` of it, or its last name."""
    return {place: known.get(place, _last(place)) for place in places}


def renamed(text: str, names: Mapping[str, str]) -> str:
    """The text with every place replaced, also inside sentences; the longest first."""
    for place in sorted(names, key=len, reverse=True):
        for written in dict.fromkeys((place, json.dumps(place)[1:-1], json.dumps(place, ensure_ascii=False)[1:-1])):
            text = text.replace(written, names[place])
    return text


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _is_place(value: str) -> bool:
    """Paths from the root or the home folder, or relative to where the command ran; `/` alone is no secret."""
    return bool(_PLACE.match(value)) and "\n" not in value and len(value) > 2 and bool(_last(value))


def _last(place: str) -> str:
    kind: type[PurePath] = PureWindowsPath if "\\" in place else PurePosixPath
    return kind(place).name
