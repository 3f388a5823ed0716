"""Bytes of the weight files of every plan, by the code that plans and writes them: no plan has to be made.

What a plan saves is a sum over tensors only where all plans are stored in the same format. `save.format: auto` looks at
the whole model, so `with_settled_format` settles it first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from llmcompress.errors import CompressError, ExitCode
from llmcompress.exporters.base import EXPORTERS, Exact, Exporter
from llmcompress.exporters.compressed_tensors import CompressedTensorsExporter
from llmcompress.exporters.contents import CodedLinear, Contents
from llmcompress.exporters.dense_tables import bytes_of as bytes_of_kind
from llmcompress.exporters.manifest import ManifestExporter
from llmcompress.exporters.plain import PlainExporter
from llmcompress.formats import plain
from llmcompress.formats.named import Kind
from llmcompress.known_model import KnownModel
from llmcompress.loading.tensors import write_header
from llmcompress.modules.scheme import named_scheme
from llmcompress.passes.base import PASSES
from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.costs.forms import Form, Forms, bodies_of
from llmcompress.plan_search.costs.trying import forms_of
from llmcompress.plan_search.plan_space import PlanSpace, Unit
from llmcompress.plan_search.space import DROPPED, Passes
from llmcompress.planning import storage_dtype_of, tensors_outside_sites
from llmcompress.recipe.model import Save


def bytes_of(
    space: PlanSpace, known: KnownModel, settings: Mapping[str, Any], *, forms: Forms | None = None
) -> Additive:
    """The weight files of a plan, headers included, that `compress` writes for `recipe_of(space, plan, settings)`.

    `settings` as `with_settled_format` returns them. Exact but for some digits of the headers.

    Raises: CompressError where sizes depend on data or on another choice.
    """
    save = Save.model_validate(settings.get("save", {}))
    dtype = storage_dtype_of(save, known.checked)
    sizes = _Sizes(known, _exporter(save), dtype)
    forms = forms or forms_of(space, known.checked.config, storage_dtype=dtype)
    outside = tensors_outside_sites(known.checked, space.model_map, dtype)
    of_unit: dict[int, np.ndarray] = {}
    of_sites: dict[int, np.ndarray] = {}
    for index, unit in enumerate(space.units):
        if unit.kind in ("before", "after"):
            choices = space.space.before if unit.kind == "before" else space.space.after
            of_unit[index] = np.array([sizes.change(choices[each], outside, space) for each in unit.options])
        elif unit.kind == "body":
            norms = sum(sizes.of(_inside(outside, space, block)) for block in unit.blocks)
            of_unit[index] = np.array([0.0 if option == DROPPED else float(norms) for option in unit.options])
        else:
            of_sites[index] = _of_sites(space, unit, forms, sizes)
    inside = {name for block in range(len(space.model_map.blocks)) for name in _inside(outside, space, block)}
    base = sizes.of({name: kind for name, kind in outside.items() if name not in inside}) + len(write_header({})[0])
    return Additive(float(base), of_unit, of_sites)


def with_settled_format(space: PlanSpace, known: KnownModel, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with a `save.format` that holds every plan of the space.

    `auto` becomes compressed-tensors where that holds every option and every plan has the shapes that a config can say;
    otherwise our own format.
    """
    save = Save.model_validate(settings.get("save", {}))
    if save.format != "auto":
        return dict(settings)
    dtype, forms = storage_dtype_of(save, known.checked), Forms(space)
    exporter = CompressedTensorsExporter(zero_points=save.zero_points)
    changing = len(space.space.bodies) > 1 or bool(forms.unknown)
    stock = not changing and not any(
        each.rounds_embedding() for choice in space.space.after.values() for each in choice
    )
    able = stock and all(_holds(exporter, _coded(form, known), known, dtype) for form in _all(forms) if form.scheme)
    wanted = "compressed-tensors" if able else "llmcompress"
    return {**settings, "save": {**settings.get("save", {}), "format": wanted}}


class _Sizes:
    """Bytes of tensors, with the lines that the header has about them."""

    def __init__(self, known: KnownModel, exporter: Exporter, dtype: torch.dtype) -> None:
        self._known, self._exporter, self._dtype = known, exporter, dtype
        # how many digits there are depends on all tensors that come before: nearly all places are in the last tenths
        self._places = len(str(known.checked.bytes_weights // 2))

    def of(self, tensors: Mapping[str, Kind]) -> int:
        """By full name."""
        return sum(bytes_of_kind(kind) + _line_bytes(name, kind, self._places) for name, kind in tensors.items())

    def linear(self, form: Form) -> int:
        """Of all that is stored of it."""
        scheme = form.scheme
        if form.tensors is not None:
            assert isinstance(self._exporter, ManifestExporter), "what was tried was stored in our own format"
            tensors = dict(form.tensors)
        elif scheme is not None:
            tensors = self._exporter.tensors(_coded(form, self._known), self._dtype)
        else:
            shape = (form.site.outputs, form.site.inputs)
            tensors = plain.tensors(shape, self._dtype, bias=form.site.has_bias)
        return self.of({f"{form.name}.{part}": kind for part, kind in tensors.items()})

    def change(self, passes: Passes, outside: Mapping[str, Kind], space: PlanSpace) -> float:
        """By how much a choice for the whole model changes everything but linears.

        Raises: CompressError where it changes linears too.
        """
        after = dict(outside)
        for each in passes:
            names = space.model_map.site_names()
            site = space.model_map.blocks[0].structure.sites[0]
            if "shapes" in each.traits() or each.kept_fraction(names[0], site, space.model_map) != 1.0:
                raise CompressError(
                    "search.costs.whole",
                    f"`{PASSES.name_of(type(each))}` changes all linears, so what a linear takes is no sum any more",
                    fix="compress the model with it first, and search on the result",
                    exit_code=ExitCode.USAGE,
                )
            after = each.tensors_outside(after, space.model_map, self._dtype)
        return float(self.of(after) - self.of(outside))


def _exporter(save: Save) -> Exporter:
    if save.format == "auto":
        raise CompressError(
            "search.costs.format",
            "with `save.format: auto` the format depends on the whole plan, so bytes are no sum",
            fix="name the format in `save.format`, or use `with_settled_format`",
            exit_code=ExitCode.USAGE,
        )
    if save.format == "compressed-tensors":
        return CompressedTensorsExporter(zero_points=save.zero_points)
    return PlainExporter() if save.format == "plain" else EXPORTERS[save.format]()


def _of_sites(space: PlanSpace, unit: Unit, forms: Forms, sizes: _Sizes) -> np.ndarray:
    assert unit.body is not None
    bodies = bodies_of(space.units[unit.body])
    return np.array(
        [
            [float(sum(sizes.linear(form) for form in forms.of(unit, body, option))) for option in unit.options]
            for body in bodies
        ]
    )


def _all(forms: Forms) -> Iterable[Form]:
    (body, *_) = forms.space.space.bodies
    units = (unit for unit in forms.space.units if unit.kind == "sites")
    return (form for unit in units for option in unit.options for form in forms.of(unit, body, option))


def _inside(outside: Mapping[str, Kind], space: PlanSpace, block: int) -> dict[str, Kind]:
    start = f"{space.model_map.blocks[block].name}."
    return {name: kind for name, kind in outside.items() if name.startswith(start)}


def _coded(form: Form, known: KnownModel) -> CodedLinear:
    assert form.scheme is not None
    site = form.site
    return CodedLinear(
        form.name,
        named_scheme(form.scheme),
        site.outputs,
        site.inputs,
        has_bias=site.has_bias,
        is_linear=not site.transposed,
        packable=not site.transposed and form.name not in known.loader.subclassed,
    )


def _holds(exporter: Exporter, site: CodedLinear, known: KnownModel, dtype: torch.dtype) -> bool:
    contents = Contents(
        (site,), (site.name,), known.loader.merges_experts, storage_dtype=dtype, config=known.loader.config
    )
    answer = exporter.answers(contents)[site.name]
    return isinstance(answer, Exact) and answer.doubt is None


def _line_bytes(name: str, kind: Kind, places: int) -> int:
    """What the header says of one tensor, with a comma; `places`: digits of where it begins and ends."""
    header, nothing = write_header({name: kind})[0].rstrip(), write_header({})[0].rstrip()
    return len(header) - len(nothing) + 2 * places - len("0") - len(str(bytes_of_kind(kind)))
