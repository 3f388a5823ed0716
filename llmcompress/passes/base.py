"""What a compression algorithm is: a frozen set of options, and one method that works on one block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from llmcompress.calibration.stream import BlockWork
from llmcompress.evaluation.report import SiteReport
from llmcompress.model.site import LinearSite
from llmcompress.numerics.statistics import Statistic
from llmcompress.registry import Registry


class BlockPass(BaseModel, ABC):
    """One algorithm. The fields are exactly the options that a recipe may set.

    `sites`, `exclude` and the keys of `overrides` are globs on full module names (`*.down_proj`); an override
    changes options for the sites it matches, the last match wins.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    produces_codes: ClassVar[bool] = False
    """Whether the sites it touches hold codes afterwards, so that no later pass may touch their weights."""

    whole_block: ClassVar[frozenset[str]] = frozenset()
    """Options that concern a block as a whole, so that `overrides` for single sites cannot change them."""

    sites: tuple[str, ...] = Field(("*",), description="globs of module names to work on")
    exclude: tuple[str, ...] = Field((), description="globs of module names to leave alone")
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict, description="other options for some sites")

    @field_validator("sites", "exclude", mode="before")
    @classmethod
    def _one_glob(cls, value: Any) -> Any:
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @field_validator("overrides")
    @classmethod
    def _only_site_options(cls, overrides: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for glob, options in overrides.items():
            wrong = sorted(cls.whole_block & options.keys())
            if wrong:
                raise ValueError(f"{wrong[0]!r} cannot differ from site to site (override of {glob!r})")
        return overrides

    def selects(self, site: str) -> bool:
        """Whether this pass works on the site with that full name."""
        return _matches(site, self.sites) and not _matches(site, self.exclude)

    def for_site(self, site: str) -> Self:
        """The same pass with the overrides that match the site applied."""
        changed = {
            option: value
            for glob, options in self.overrides.items()
            if fnmatchcase(site, glob)
            for option, value in options.items()
        }
        return type(self)(**{**self.model_dump(), **changed, "overrides": {}}) if changed else self

    def quantizes(self) -> bool:
        """Whether the sites hold codes afterwards, with these options."""
        return self.produces_codes

    @abstractmethod
    def needs(self) -> tuple[type[Statistic], ...]:
        """Which statistics of the inputs `apply` reads; empty for a pass that needs no data."""

    @abstractmethod
    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Compress the given sites of one block, already measured; one report row per site touched."""

    def run(self, block: BlockWork) -> list[SiteReport]:
        """Measure what is needed on the selected sites, apply, forget."""
        sites = [site for site in block.sites if self.selects(site.name)]
        if not sites:
            return []
        if self.needs():
            block.measure(sites, self.needs())
        rows = self.apply(block, sites)
        block.forget()
        return rows


def _matches(site: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(site, glob) for glob in globs)


PASSES: Registry[BlockPass] = Registry("pass", "llmcompress.passes")
