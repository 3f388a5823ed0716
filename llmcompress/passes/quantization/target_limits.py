"""Adapts passes to the limits of the export target before any work."""

from __future__ import annotations

from typing import Any

from llmcompress.errors import CompressError
from llmcompress.modules.limits import TargetLimits
from llmcompress.modules.scheme import Scheme, named_scheme
from llmcompress.passes.base import PASSES, Pass


def within_limits(each: Pass, limits: TargetLimits) -> Pass:
    """The same pass; every scheme that its options name, in overrides and inner passes too, as the target takes it.

    Only the sign of scales changes. Whatever else the target cannot hold, it refuses.
    """
    if not limits.positive_scales:
        return each
    options = each.model_dump(mode="json")
    if options.keys().isdisjoint(("scheme", "schemes")):
        options = {name: _with_inner_scheme(value) for name, value in options.items()}
    return type(each).model_validate(_with_positive_scales(options))


def _with_inner_scheme(option: Any) -> Any:
    """Where an inner pass (`{gptq: {range: mse}}`) has its own scheme: that scheme, even if it is the default."""
    if not isinstance(option, dict) or len(option) != 1:
        return option
    ((name, inside),) = option.items()
    scheme = PASSES[name].model_fields.get("scheme") if name in PASSES else None
    return option if scheme is None else {name: {"scheme": scheme.default, **inside}}


def _with_positive_scales(options: Any) -> Any:
    if isinstance(options, dict):
        return {key: _with_positive_scales(value) for key, value in options.items()}
    if isinstance(options, list):
        return [_with_positive_scales(value) for value in options]
    scheme = _scheme(options) if isinstance(options, str) else None
    return options if scheme is None else scheme.with_positive_scales().name


def _scheme(text: str) -> Scheme | None:
    """No other option is spelled like a scheme."""
    try:
        return named_scheme(text)
    except CompressError:
        return None
