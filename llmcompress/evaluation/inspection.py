"""What `inspect` shows: the map of a dense model, and what each site of a compressed one is. No weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmcompress.evaluation.checkpoint_codes import CodedSite, StoredCodes, codes_in
from llmcompress.loading.config import read_config
from llmcompress.model.describe import describe, together
from llmcompress.model.probe import probe
from llmcompress.records.report import REPORT, Report, read_report
from llmcompress.storage.json_file import read_json


def inspect_folder(folder: Path) -> dict[str, Any]:
    """The model map: blocks, sites, shared inputs, folds, width groups, and what cannot be compressed and why.

    Of a compressed model: what was done to it, and of each site scheme, bits, sparsity, rank and size, by its config,
    manifest, report and the headers of its weight files.

    Raises: CompressError when there is no such model, its structure or its format is not understood.
    """
    report = read_report(folder) if (folder / REPORT).is_file() else None
    raw = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if raw.get("quantization_config"):
        return _saved(codes_in(folder), raw, report)
    found = describe(probe(read_config(folder)[0], unfuse=True))
    return found if report is None else {**found, **_history(report), "compressed": together(_reported(report))}


def _saved(stored: StoredCodes, config: Mapping[str, Any], report: Report | None) -> dict[str, Any]:
    """A folder that a loader must know how to read."""
    sites = {row["site"]: row for row in (_reported(report) if report else ())}
    for name, spec in config["quantization_config"].get("modules", {}).items():
        sites[name] = {"site": name, **sites.get(name, {}), **_of_spec(spec)}
    for site in stored.coded:
        sites[site.name] = {**sites.get(site.name, {"site": site.name}), **_of_codes(site)}
    return {
        "family": config.get("model_type"),
        "format": stored.format,
        "dense_tensors": len(stored.dense),
        **(_history(report) if report else {}),
        "sites": len(sites),
        "compressed": together(list(sites.values())),
    }


def _history(report: Report) -> dict[str, Any]:
    return {"made_from": report.model, "recipe": report.recipe_hash}


def _reported(report: Report) -> list[dict[str, Any]]:
    """Every site that a pass touched, by the last row that says something of each."""
    found: dict[str, dict[str, Any]] = {}
    for row in report.sites:
        site = found.setdefault(row.site, {"site": row.site, "by": ""})
        site["by"] = ", ".join(part for part in (site["by"], row.algorithm) if part)
        said = {
            "scheme": row.scheme,
            "bits": row.bits_per_weight and round(row.bits_per_weight, 3),
            "sparsity": row.sparsity and round(row.sparsity, 3),
            "rank": row.rank,
            "removed": row.removed,
        }
        site |= {key: value for key, value in said.items() if value is not None}
    return list(found.values())


def _of_codes(site: Any) -> dict[str, Any]:
    """By the files, which know better than the report."""
    scheme = site.scheme if isinstance(site, CodedSite) else None
    named = {"scheme": scheme.name} if scheme else {"code_bits": float(site.code_bits)}
    bits = round(site.ideal_bits / site.weights, 3)
    return {**named, "bits": bits, "outputs": site.outputs, "inputs": site.inputs}


def _of_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of a module, as far as it is a number or a word."""
    plain = {key: value for key, value in spec.items() if isinstance(value, int | float | str) and key != "type"}
    right = spec.get("right")
    rank = {"rank": right["outputs"]} if isinstance(right, Mapping) and "outputs" in right else {}
    return {"kind": str(spec.get("type", "")), **plain, **rank}
