"""The `quantization_config` of compressed-tensors: one group per scheme, with few targets."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    DynamicType,
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)

from llmcompress.formats.compressed_tensors import Layout
from llmcompress.modules.limits import group_of
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.formats import POWER_OF_TWO, TWO_LEVEL, ScaleKind


@dataclass(frozen=True)
class NamedCodes:
    """A quantized linear under its name on disk."""

    name: str
    scheme: Scheme
    layout: Layout
    inputs: int

    @property
    def group(self) -> int | None:
        """Inputs that share a scale; None when a row is one group."""
        return group_of(self.scheme, self.inputs)


def quantization_config(
    sites: Sequence[NamedCodes], flat: Set[str], linears: Iterable[str], cache: QuantizationArgs | None = None
) -> dict[str, Any]:
    """JSON data for config.json; the linears of the model that are no site are listed under `ignore`.

    `flat` names sites whose input arrives as tokens × channels, without a batch axis; `cache` is how keys and values
    are stored.
    """
    members: dict[str, list[str]] = defaultdict(list)
    kinds: dict[str, QuantizationScheme] = {}
    for site in sites:
        kind = _kind(site, site.name in flat)
        kinds.setdefault(kind.model_dump_json(), kind)
        members[kind.model_dump_json()].append(site.name)
    names = {site.name for site in sites}
    everything = names.union(linears)
    for key, kind in kinds.items():
        kind.targets = name_patterns(members[key], everything)
    formats = {str(CompressionFormat(kind.format).value) for kind in kinds.values()} or {CompressionFormat.dense.value}
    config = QuantizationConfig(
        config_groups={f"group_{i}": kind for i, kind in enumerate(kinds.values())},
        format=formats.pop() if len(formats) == 1 else CompressionFormat.mixed_precision.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=name_patterns(sorted(everything - names), everything),
        kv_cache_scheme=cache,
    )
    data: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return {"version": compressed_tensors.__version__, **data}


def _kind(site: NamedCodes, flat: bool) -> QuantizationScheme:
    """A site's scheme in the format's own words, without targets."""
    layout, grid = site.layout, site.scheme.weights
    words: dict[str, Any] = {} if grid.number is None else {"type": "float"} | _SCALES.get(grid.scales, {})
    strategy = "tensor" if grid.scales.single else "group" if site.group else "channel"
    weights = QuantizationArgs(
        num_bits=layout.bits,
        symmetric=layout.symmetric,
        **{"strategy": strategy, "group_size": site.group, **words},
    )
    inputs, words = None, words if site.scheme.activations == "group" else {"type": weights.type}
    if site.scheme.activations == "tensor":
        inputs = QuantizationArgs(num_bits=8, strategy="tensor", dynamic=False, **words)
    elif site.scheme.activations == "token" and not flat:
        inputs = QuantizationArgs(num_bits=8, strategy="token", dynamic=True, **words)
    elif site.scheme.activations == "token":
        # for tokens × channels the library's `token` takes one scale for all tokens; one group per row is per token
        inputs = QuantizationArgs(num_bits=8, strategy="group", group_size=site.inputs, dynamic=True, **words)
    elif site.scheme.activations == "group":
        dynamic = DynamicType.LOCAL if site.scheme.measures_inputs else True
        words = {"strategy": "group", **words}
        inputs = QuantizationArgs(num_bits=layout.bits, group_size=site.group, dynamic=dynamic, **words)
    return QuantizationScheme(targets=[], weights=weights, input_activations=inputs, format=layout.format)


_SCALES: dict[ScaleKind, dict[str, Any]] = {
    POWER_OF_TWO: {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8},
    TWO_LEVEL: {"strategy": "tensor_group", "scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn},
}


def name_patterns(names: Sequence[str], everything: Iterable[str]) -> list[str]:
    """Target strings that match exactly `names` out of `everything`: one per set of numbered siblings if possible.

    Loaders try every target on every module, so a name each for 10 000 experts would take minutes.
    """
    siblings: dict[str, set[str]] = defaultdict(set)
    for name in everything:
        siblings[numbered(name)].add(name)
    chosen, found = set(names), []
    for pattern in dict.fromkeys(map(numbered, names)):
        family = siblings[pattern]
        if family <= chosen and len(family) > 1:
            found.append(f"re:{pattern}$")
        elif len(family) == 1:
            found += family
        else:
            found += [f"re:{re.escape(name)}$" for name in sorted(family & chosen)]
    return found


def numbered(name: str) -> str:
    """The name as a regular expression in which every number may be any number."""
    return ".".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split(".")).replace(".", r"\.")
