"""What is installed in the running interpreter, from the metadata of packages: nothing is imported."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement

OWN = "llmcompress"


def version_of(package: str) -> str | None:
    """The installed version; None: there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def unsatisfied(requirements: Iterable[str]) -> tuple[str, ...]:
    """What of these requirements the running interpreter lacks, one line each; empty: nothing."""
    found = []
    for text in requirements:
        requirement = Requirement(text)
        version = version_of(requirement.name)
        if version is None:
            found.append(f"{text} (not installed)")
        elif not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{text} (installed: {version})")
    return tuple(found)


def requirements_of_extras() -> dict[str, tuple[str, ...]]:
    """What each of our own extras asks for, extras inside extras resolved; empty where we are not installed."""
    try:
        ours = metadata.distribution(OWN)
    except metadata.PackageNotFoundError:
        return {}
    names = sorted(ours.metadata.get_all("Provides-Extra") or [])
    direct: dict[str, list[Requirement]] = {name: [] for name in names}
    for text in ours.requires or []:
        requirement = Requirement(text)
        for name in names:
            marker = requirement.marker
            if marker is not None and marker.evaluate({"extra": name}) and not marker.evaluate({"extra": ""}):
                direct[name].append(requirement)
    return {name: tuple(dict.fromkeys(_resolved(name, direct))) for name in names}


def _resolved(extra: str, direct: dict[str, list[Requirement]]) -> Iterable[str]:
    for requirement in direct[extra]:
        if requirement.name == OWN:
            for inner in sorted(requirement.extras):
                yield from _resolved(inner, direct)
        else:
            yield f"{requirement.name}{requirement.specifier}"
