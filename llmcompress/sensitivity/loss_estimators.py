"""Fills loss tables together: one gradient sweep, then one dense stream, for all estimators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from llmcompress.calibration.measurement_cache import CachedMeasurements
from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.site import LinearSite
from llmcompress.numerics.statistics import Statistic
from llmcompress.sensitivity.gradients import GradientObserver, sweep
from llmcompress.sensitivity.table import LossTable, Row

Kinds = tuple[type[Statistic], ...]
Measurements = tuple[frozenset[str], Kinds]
"""Sites by full name, and the statistics of their inputs."""


class LossEstimator(ABC):
    """Fills one loss table: what to measure, and how a measured block becomes rows."""

    @property
    @abstractmethod
    def sites(self) -> frozenset[str]:
        """Full names of the linears that are measured."""

    @property
    def kinds(self) -> Kinds:
        """Statistics of their inputs."""
        return ()

    @property
    def observers(self) -> Sequence[GradientObserver]:
        """Gradient observers that it needs."""
        return ()

    @abstractmethod
    def rows(self, block: BlockWork, sites: Sequence[LinearSite]) -> Iterable[Row]:
        """The block's rows; `sites` are its requested linears, measured. The block must not change."""


def measure_losses(whole: WholeModel, estimators: Sequence[LossEstimator]) -> list[LossTable]:
    """One table per estimator, in their order; the model is not changed."""
    sweep(whole, [observer for each in estimators for observer in each.observers])
    rows: list[list[Row]] = [[] for _ in estimators]
    for block in dense_stream(whole, [(each.sites, each.kinds) for each in estimators]):
        for found, each in zip(rows, estimators, strict=True):
            found += each.rows(block, [site for site in block.sites if site.name in each.sites])
    return [LossTable(tuple(found)) for found in rows]


def cached_table(whole: WholeModel, name: str, make: Callable[[], LossTable]) -> LossTable:
    """The saved table of that name, or a new one, which is then saved."""
    keep, state = whole.context.keep, whole.context.state
    if keep is None or state is None:
        return make()
    known = keep.measurement(f"{state}-{name}")
    if known is not None:
        return LossTable.read(*known)
    table = make()
    keep.save_measurement(f"{state}-{name}", table.tensors(), table.about())
    return table


def dense_stream(whole: WholeModel, wanted: Sequence[Measurements]) -> Iterator[BlockWork]:
    """Every block of the unchanged model; sites have all requested statistics, including cached ones.

    If nothing is missing, the blocks are visited without running them.
    """
    cached = whole.context.cached_measurements()
    if all(_known(cached, *each) for each in wanted):
        whole = whole.within(replace(whole.context, windows_NT=whole.context.windows_NT[:0]))
    for block in whole.stream():
        _measure(block, wanted, cached)
        yield block
        block.forget()


def _known(cached: CachedMeasurements | None, names: frozenset[str], kinds: Kinds) -> bool:
    return all(cached is not None and cached.find(kind, name) is not None for name in names for kind in kinds)


def _measure(block: BlockWork, wanted: Sequence[Measurements], cached: CachedMeasurements | None) -> None:
    """One forward for all sites that need the same statistics; sites that share an input share them."""
    found: dict[str, dict[type[Statistic], Statistic]] = {}
    missing: dict[Kinds, list[LinearSite]] = {}
    for group in block.input_groups():
        names = {site.name for site in group}
        kinds = tuple(dict.fromkeys(kind for each, kinds in wanted if names & each for kind in kinds))
        asked = [site for site in group if any(site.name in each for each, of in wanted if of)]
        known = {kind: one for kind in kinds if cached and asked and (one := cached.find(kind, asked[0].name))}
        found |= {site.name: dict(known) for site in asked}
        if left := tuple(kind for kind in kinds if kind not in known):
            missing.setdefault(left, []).extend(asked)
    for kinds, sites in missing.items():
        block.measure(sites, kinds)
        for site in sites:
            for kind in kinds:
                found[site.name][kind] = site.statistic(kind)
                if cached:
                    cached.put(found[site.name][kind], site.name)
    for site in block.sites:
        site.set_statistics(found.get(site.name, {}))
