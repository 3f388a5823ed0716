"""The quantization pass inside another pass, written as `{name: {option: value}}`; it gets its scheme from outside."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator

from llmcompress.passes.base import PASSES
from llmcompress.passes.quantizing import QuantizingPass

_OUTSIDE = {name: name for name in ("sites", "exclude", "overrides", "new_stage")} | {"scheme": "schemes"}
"""Option of the quantizer → the option of the outer pass to use instead."""


def quantizer_with(
    named: Mapping[str, dict[str, Any]],
    scheme: str,
    *,
    sites: tuple[str, ...] = ("*",),
    exclude: tuple[str, ...] = (),
    overrides: Mapping[str, dict[str, Any]] | None = None,
    sitewise: bool = False,
) -> QuantizingPass:
    """That pass with that scheme; `sitewise`: it must change nothing but the sites it is given.

    Raises: ValueError when there is no such pass, or it is given what the outer pass decides.
    """
    if len(named) != 1:
        raise ValueError("name exactly one quantization pass, e.g. {gptq: {}}")
    ((name, options),) = named.items()
    known = _serving(sitewise=sitewise)
    if name not in known:
        raise ValueError(f"use one of {', '.join(known)}; {name!r} does not only quantize")
    for option, instead in _OUTSIDE.items():
        if option in options:
            raise ValueError(f"{option!r} cannot be set inside `quantizer`: set `{instead}` next to it")
    cls = PASSES[name]
    assert issubclass(cls, QuantizingPass)
    if sitewise and cls.whole_block & options.keys():
        raise ValueError(
            f"{min(cls.whole_block & options.keys())!r} cannot be set in `quantizer`: it runs on one site at a time"
        )
    return cls(**options, sites=sites, exclude=exclude, overrides=dict(overrides or {}), scheme=scheme)


def checked(named: dict[str, dict[str, Any]], *, sitewise: bool = False) -> dict[str, dict[str, Any]]:
    """The same, where such a pass can be had; for the validators of passes that take one.

    Raises: ValueError when there is no such pass, or it is given what the outer pass decides.
    """
    for options in named.values():
        if "on_indivisible" in options:
            raise ValueError("'on_indivisible' cannot be set inside `quantizer`: set it next to it")
    quantizer_with(named, "int4_channel", sitewise=sitewise)
    return named


def nested(outer: QuantizingPass, named: Mapping[str, dict[str, Any]]) -> QuantizingPass:
    """That pass with the scheme, the sites and the overrides of the pass around it."""
    ((name, options),) = named.items()
    return quantizer_with(
        {name: {**options, "on_indivisible": outer.on_indivisible}},
        outer.scheme,
        sites=outer.sites,
        exclude=outer.exclude,
        overrides=outer.overrides,
    )


def _serving(*, sitewise: bool) -> Collection[str]:
    """Names of the passes that only quantize."""
    found = [(name, PASSES[name]) for name in PASSES]
    return [
        name
        for name, cls in found
        if issubclass(cls, QuantizingPass) and cls.leaves == frozenset({"codes"}) and (cls.sitewise or not sitewise)
    ]


class AroundQuantizer(QuantizingPass):
    """A pass on whole blocks in which another one quantizes, with the scheme and the sites of this pass."""

    sitewise: ClassVar[bool] = False

    quantizer: dict[str, dict[str, Any]] = Field(
        {"gptq": {}},
        description="one quantization pass with its options, without its scheme, e.g. {gptq: {damping: 0.02}}",
    )

    @field_validator("quantizer")
    @classmethod
    def _known_quantizer(cls, named: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return checked(named)

    @property
    def inner(self) -> QuantizingPass:
        """The quantization pass, with this pass's other options."""
        return nested(self, self.quantizer)
