"""Globs on full module names."""

from __future__ import annotations

from fnmatch import fnmatchcase


def matches(site: str, *globs: str) -> bool:
    """Whether a site has a name like one of these; `*.down_proj|*.fc2`: one of several."""
    return any(fnmatchcase(site, each) for glob in globs for each in glob.split("|"))
