"""Ways to compensate removed units in the linear that reads them, one table row each. O = outputs, I = inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from llmcompress.model.site import LinearSite
from llmcompress.numerics.importance import output_products
from llmcompress.numerics.refit import Refitted, deleted, refit_bias, refit_columns, refit_scales
from llmcompress.numerics.statistics import Gram, Moments, Statistic

RefitName = Literal["columns", "scales", "bias", "none"]


class Refit(ABC):
    """One way to compensate removed units."""

    needs: ClassVar[tuple[type[Statistic], ...]] = (Gram,)

    @abstractmethod
    def __call__(self, site: LinearSite, kept_I: Tensor, unit_of_I: Tensor, units: int, damping: float) -> Refitted:
        """New weights of a measured reader, of which these columns stay."""


class Columns(Refit):
    """Least squares over all kept columns, and the bias if there is one."""

    needs = (Gram, Moments)

    @override
    def __call__(self, site: LinearSite, kept_I: Tensor, unit_of_I: Tensor, units: int, damping: float) -> Refitted:
        gram = site.statistic(Gram)
        mean_I = None if site.bias_O is None else site.statistic(Moments).mean_I
        return refit_columns(site.weight_OI, gram.sum_II, kept_I, damping=damping, mean_I=mean_I, tokens=gram.tokens)


class Scales(Refit):
    """One factor per kept unit."""

    @override
    def __call__(self, site: LinearSite, kept_I: Tensor, unit_of_I: Tensor, units: int, damping: float) -> Refitted:
        weight_OI, gram_II = site.weight_OI, site.statistic(Gram).sum_II
        products_UU = output_products(weight_OI.double(), gram_II.double(), unit_of_I, units)
        return refit_scales(weight_OI, gram_II, kept_I, products_UU, unit_of_I, damping=damping)


class Bias(Refit):
    """The mean of the removed units in a bias, which is added where there is none."""

    needs = (Gram, Moments)

    @override
    def __call__(self, site: LinearSite, kept_I: Tensor, unit_of_I: Tensor, units: int, damping: float) -> Refitted:
        gram = site.statistic(Gram)
        mean_I = site.statistic(Moments).mean_I
        return refit_bias(site.weight_OI, gram.sum_II, kept_I, mean_I=mean_I, tokens=gram.tokens)


class NoRefit(Refit):
    """No compensation: the units are only removed."""

    needs = ()

    @override
    def __call__(self, site: LinearSite, kept_I: Tensor, unit_of_I: Tensor, units: int, damping: float) -> Refitted:
        return deleted(site.weight_OI, None, kept_I)


REFITS: Mapping[RefitName, Refit] = MappingProxyType(
    {"columns": Columns(), "scales": Scales(), "bias": Bias(), "none": NoRefit()}
)
