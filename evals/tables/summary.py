"""The overview: the perplexity of each kind of compression, beside that of its naive baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import mean
from typing import Any, NamedTuple

from tables.cells import Facts, environment, markdown, protocol

MODEL = "books-llama"


class Line(NamedTuple):
    """One line of the table: which row of which result file, and which one is the baseline."""

    left: str
    made: str
    file: str
    row: Mapping[str, Any]
    naive: str
    naive_row: Mapping[str, Any]


def _scheme(name: str, method: str) -> dict[str, Any]:
    return {"scheme": name, "method": method}


def _zeros(share: str, method: str, table: str = "masks") -> dict[str, Any]:
    return {"table": table, "share": share, "method": method}


def _factors(setting: str, method: str) -> dict[str, Any]:
    return {"setting": setting, "method": method}


def _lines() -> Iterator[Line]:
    for bits, made in ((4, "awq→gptq"), (3, "gptq")):
        scheme = f"int{bits}_g32"
        left = f"{bits}-bit weights, groups of 32"
        yield Line(left, made, "quantization", _scheme(scheme, made), "rtn", _scheme(scheme, "rtn"))
    setting = "int2_g32, rank 16"
    made_of, naive = _factors(setting, "caldera, int8 factors"), _factors(setting, "rtn")
    yield Line(
        "2-bit weights and a low-rank branch of rank 16", "caldera", "low-rank", made_of, "rtn, no branch", naive
    )
    for share, left in (("50 %", "50 % unstructured sparsity"), ("2:4", "2:4 sparsity")):
        yield Line(left, "sparsegpt", "sparse", _zeros(share, "sparsegpt"), "magnitude", _zeros(share, "magnitude"))
    left = "2:4 sparsity and 4-bit weights"
    both, naive = (_zeros("2:4", f"{mask}→gptq", "rounded") for mask in ("sparsegpt", "magnitude"))
    yield Line(left, "sparsegpt→gptq", "sparse", both, "magnitude → gptq", naive)
    influence, every = ({"remove": 1, "method": each} for each in ("block influence", "every choice"))
    yield Line("1 of 5 blocks removed", "depth", "depth", influence, "mean of all choices", every)
    made_of, naive = {"variant": "activation", "refit": "columns"}, {"variant": "random", "refit": "none"}
    yield Line("25 % of heads and FFN channels removed", "width", "width", made_of, "random units, no refit", naive)
    made_of, naive = ({"ratio": "25%", "method": each} for each in ("pca, refit", "random basis"))
    yield Line("25 % of the residual stream removed", "slicegpt", "slicegpt", made_of, "random basis", naive)
    made_of, naive = (_factors("20% removed", each) for each in ("svd-llm, ranks by loss", "plain svd"))
    yield Line(
        "20 % of the linears' parameters removed, as low-rank factors", "svd", "low-rank", made_of, "plain svd", naive
    )


LINES = tuple(_lines())


def summary(results: Mapping[str, Facts]) -> str:
    """Of the bundled model; `results`: file name without model → facts.

    Raises: KeyError when a line names a row that its file does not have.
    """
    dense = results["quantization"]["dense"]
    body = []
    for line in LINES:
        facts = results[line.file]
        assert facts["dense"]["perplexity"] == dense["perplexity"], f"{line.file} was measured on other text"
        made, naive = (f"×{_of(facts, row) / dense['perplexity']:.3f}" for row in (line.row, line.naive_row))
        passes = " → ".join(f"`{each}`" for each in line.made.split("→"))
        body.append([line.left, passes, made, f"{line.naive}: {naive}"])
    about = (
        f"Perplexity of the bundled model ÷ {dense['perplexity']:.2f}, that of the dense model, on `{dense['text']}` "
        f"({protocol(dense['window'], dense['bos'])}, {dense['tokens']:,} tokens); means over calibration draws."
    )
    header = ["compression", "passes", "perplexity", "naive baseline"]
    return "\n\n".join([about, markdown(header, body), environment(results["quantization"])])


def _of(facts: Facts, wanted: Mapping[str, Any]) -> float:
    rows = facts["rows"]
    every = [row for part in rows.values() for row in part] if isinstance(rows, dict) else rows
    for row in every:
        if wanted.items() <= row.items():
            return mean(row["perplexity"])
    raise KeyError(f"no row {dict(wanted)} in the results of {facts['model']}")
