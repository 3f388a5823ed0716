"""Deep Compression step by step on a real model, beside gptq's grids of the same bytes, all as entropy-coded archives.

    OMP_NUM_THREADS=1 python evals/deep_compression.py --calibration wikitext-2/valid.txt \\
        --text WikiText-2=wikitext-2/test.txt --text books=books/test.txt --validation books-valid=books/valid.txt

Rows of `ROWS` are made in order. Settings of the preset were chosen by output errors on the calibration text, not by
any text that is measured here. Every row is exported as an archive, read back, and written to
evals/results/deep-compression-NAME.json as soon as it is done, with the losses of every window; it is not made again.
Losses are measured with dense copies of the decoded weights, in float32: the same numbers in less time. Set
OMP_NUM_THREADS=1: seconds are CPU seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from qat import dense_nats, shown
from real_model import NAME, real_model
from real_trials import Results, named
from study import Bench, Study, Trial, per_window, study_options
from torch import nn
from transformers import PreTrainedModel

from llmcompress.exporters.archive import ArchiveExporter
from llmcompress.exporting import Exportable, export
from llmcompress.loading.teachers import TeacherFiles
from llmcompress.modules.codebook_linear import CodebookLinear
from llmcompress.storage.paths import cache_folder

HERE = Path(__file__).resolve().parent
SAMPLES = 8
"""Of 512 tokens."""

Passes = tuple[dict[str, dict[str, Any]], ...]


class Row(NamedTuple):
    """What is measured, and on which texts: steps on the way only on those that are reported."""

    method: str
    passes: Passes
    candidate: bool = True


def sharing(sparsity: float, table: bool = True, **options: Any) -> Passes:
    """Pruned, shared, and with `table` the token embedding in eight bits."""
    pruned: Passes = ({"sparsegpt": {"sparsity": sparsity}},) if sparsity else ()
    return (*pruned, {"kmeans": options}, *TABLE * table)


def grid(scheme: str) -> Passes:
    """The strongest ordinary quantizer at that grid that takes as long."""
    return ({"gptq": {"scheme": scheme, "range": "joint"}}, *TABLE)


def trained(steps: int, rate: float) -> dict[str, dict[str, Any]]:
    """Levels and norms, on KL to the dense model."""
    training = {"steps": steps, "batch": 2, "learning_rate": rate}
    return {"recover": {"teacher": "original", "train": "norms_and_scales", "training": training}}


TABLE: Passes = ({"embeddings": {}},)
DENSE = "dense"
ROWS: tuple[Row, ...] = (
    Row(DENSE, ()),
    Row("pruned 20 %, 32 levels, table int8", sharing(0.2, bits=5)),
    Row("gptq int4_g64, table int8", grid("int4_g64")),
    Row("not pruned, 32 levels, table int8", sharing(0.0, bits=5)),
    Row("pruned 50 %, 16 nearest levels", sharing(0.5, False, bits=4, assignment="nearest"), False),
    Row("pruned 50 %, 16 levels", sharing(0.5, False, bits=4), False),
    Row("gptq int3_g64, table int8", grid("int3_g64")),
    Row("pruned 50 %, 16 levels, trained", (*sharing(0.5, False, bits=4), trained(24, 1e-3)), False),
    Row("pruned 20 %, 32 levels, trained, table int8", (*sharing(0.2, False, bits=5), trained(8, 1e-3), *TABLE)),
)


@click.command()
@study_options(chosen="settings are", only="methods")
def main(
    model: Path | None,
    name: str,
    calibration: Path,
    texts: Sequence[str],
    validation: Sequence[str],
    only: Sequence[str],
) -> None:
    """Do what is missing."""
    cache = cache_folder() / "evals"
    study = Study(model or real_model(), calibration, named(texts), named(validation), cache, samples=SAMPLES)
    results, bench = Results(HERE / "results" / f"deep-compression-{name}.json", study), Bench(study)
    for row in ROWS:
        if (only and row.method not in only) or any(row.method == trial["method"] for trial in results.trials):
            continue
        trial = {"method": row.method, "passes": list(row.passes), **made(bench, row)}
        results.add(bench, trial)
        sizes = f"{trial['bytes'] / 1e6:.1f} MB at rest, {trial['bytes_in_memory'] / 1e6:.1f} in memory"
        click.echo(f"{row.method}: {sizes}, {shown(trial)}", err=True)
    click.echo(str(results.path))


def made(bench: Bench, row: Row) -> Trial:
    """Compress, archive, measure."""
    study, names = bench.study, [*bench.study.texts, *(bench.study.validation if row.candidate else ())]
    loaded = study.loaded()
    model, taken = loaded.model, Trial(cpu_seconds=0.0)
    if row.passes:
        model, taken = bench.compress(row.passes, 0, teachers=TeacherFiles(str(study.model)))
    exportable = Exportable(model, loaded.tokenizer, NAME, loaded.preflight.storage_dtype, model.generation_config)
    with tempfile.TemporaryDirectory() as scratch:
        written = export(exportable, ArchiveExporter(), Path(scratch) / "archive", overwrite=False)
    assert written.read_back and not written.differing
    if row.passes:
        found = bench.measure(decoded(model), names)
    else:
        found = {name: per_window(bench.text(name).windows, bench.text(name).windows) for name in names}
    return {
        **taken,
        "bytes": written.bytes,
        "bytes_in_memory": written.unpacked_bytes,
        "texts": found,
        "dense_nats": {name: dense_nats(bench, name) for name in found},
    }


def decoded(model: PreTrainedModel) -> PreTrainedModel:
    """The model with ordinary linears where codebooks were, which unpack their codes in every call."""
    for name, module in list(model.named_modules()):
        if isinstance(module, CodebookLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            linear.weight = nn.Parameter(module.dense_weight().float(), requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
