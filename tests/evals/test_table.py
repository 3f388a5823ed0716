"""Result files become tables that state the protocol, the spread and the ratio to dense."""

from __future__ import annotations

import json
from typing import Any

import pytest
import table
from tables import cost, pruning, quantization, summary

MADE = {"versions": {"torch": "2.13.0", "transformers": "5.1"}, "machine": {"cpu": "a processor", "cores": "2"}}


def test_quantization_shows_mean_range_ratio_and_protocol():
    dense = {"text": "test.txt", "window": 512, "bos": True, "tokens": 51100, "perplexity": 50.0, "bits_per_byte": 2.0}
    rows = [
        {"scheme": "int4_g32", "method": "rtn", "perplexity": [60.0]},
        {"scheme": "int4_g32", "method": "gptq", "perplexity": [52.0, 54.0, 53.0]},
    ]
    shown = quantization.quantization(
        {"model": "m", "calibration": "train.txt", "samples": 64, "tokens": 256, "dense": dense, "rows": rows, **MADE}
    )
    assert "| `int4_g32` | 60.00, ×1.200 | 53.00 (52.00–54.00), ×1.060 |" in shown
    assert "dense perplexity 50.000 on `test.txt`" in shown and "windows of 512, each with BOS" in shown
    assert "64 × 256 tokens of `train.txt`" in shown and "3 calibration draws" in shown


DENSE = {"text": "test.txt", "window": 512, "bos": True, "tokens": 51100, "perplexity": 50.0, "bits_per_byte": 2.0}


def test_zeros_are_shown_by_question_and_against_the_peer():
    rows = [
        {"table": "masks", "share": "50 %", "method": "magnitude", "perplexity": [60.0]},
        {"table": "masks", "share": "50 %", "method": "wanda", "perplexity": [54.0, 56.0]},
        {"table": "budgets", "share": "70 %", "method": "wanda, outliers", "perplexity": [100.0]},
    ]
    facts = {"model": "m", "calibration": "train.txt", "samples": 64, "tokens": 256, "dense": DENSE, **MADE}
    shown = pruning.sparse({**facts, "rows": rows})
    assert "| magnitude | 60.00, ×1.200 |" in shown and "| wanda | 55.00 (54.00–56.00), ×1.100 |" in shown
    assert "| wanda, outliers | 100.00, ×2.000 |" in shown
    rows = [{"share": "2:4", "method": "wanda", "ours": [55.0], "peer": [60.0]}]
    peer = {"peer": "p", "peer_versions": {"llmcompressor": "0.14"}}
    assert "| 2:4 | wanda | 55.00, ×1.100 | 60.00, ×1.200 |" in pruning.sparse_peer({**facts, **peer, "rows": rows})


def test_seconds_are_shown_beside_the_peer():
    rows = [
        {"method": "wanda 2:4", "samples": 8, "ours": [1.5, 2.5], "peer": [3.0]},
        {"method": "perplexity", "samples": 8, "ours": [1.05], "peer": []},
    ]
    growth = [{"method": "gptq", "by": "blocks", "values": [2, 4], "exponent": 1.0}]
    facts = {"tokens": 512, "parameters": 110e6, "peer_versions": {"llmcompressor": "0.14"}, **MADE}
    shown = cost.seconds({**facts, "rows": rows, "growth": growth})
    assert "| wanda 2:4 | 8 × 512 | 2.00 (1.50–2.50) | 3.00 |" in shown and "110 M random weights" in shown
    assert "| perplexity | 8 × 512 | 1.05 | – |" in shown and "llm-compressor 0.14" in shown
    assert "| gptq | blocks | 2, 4 | 1.00 |" in shown


def test_codes_are_shown_against_each_peer_and_failures_keep_their_reason():
    made = {"scheme": "int3_g32", "cpu_seconds": [4.0], "note": ""}
    rows = [
        {**made, "who": "ours", "method": "learned", "perplexity": [54.0, 56.0]},
        {**made, "who": "p", "method": "gptq", "perplexity": [60.0]},
        {**made, "who": "p", "method": "awq", "perplexity": [], "reason": "it stops"},
    ]
    facts = {"model": "m", "calibration": "train.txt", "samples": 64, "tokens": 256, "dense": DENSE, **MADE}
    told = {"peer_versions": {"p": {"p": "7.6", "torch": "2"}}}
    shown = quantization.codes_peer({**facts, **told, "rows": rows})
    assert "| ours | learned | 55.00 (54.00–56.00), ×1.100, 4 s |" in shown
    assert "| p | gptq | 60.00, ×1.200 (1 draw), 4 s |" in shown
    assert "| p | awq | fails |" in shown and "p awq: it stops." in shown
    assert "p 7.6." in shown


def test_outliers_are_shown_against_dense():
    rows = [{"method": "dense", "perplexity": 50.0}, {"method": "naive W8A8, per token", "perplexity": 60.0}]
    facts = {"model": "m", "gain": 30.0, "channels": 2, "text": "t.txt", "window": 512, "bos": True, "rows": rows}
    assert "| naive W8A8, per token | 60.000 | +20.00 % |" in quantization.outliers({**facts, **MADE})


def test_rotations_are_shown_with_and_without_outliers():
    rows = [
        {"gain": gain, "method": method, "perplexity": [value]}
        for method, *found in ROTATED
        for gain, value in zip((1.0, 30.0), found, strict=True)
    ]
    shown = quantization.rotation({"model": "m", "text": "t.txt", "window": 512, "bos": True, "rows": rows, **MADE})
    assert "| recipe | as it is | outliers ×30 |" in shown and "| hadamard | 51.00, ×1.020 | 55.00, ×1.100 |" in shown


ROTATED = [("dense", 50.0, 50.0), ("hadamard", 51.0, 55.0)]


def test_map_time_is_shown_per_shape():
    rows = [{"shape": "llama 1024 / 4096", "seconds": 12.34, "sites": 7, "folds": 4}]
    assert "| llama 1024 / 4096 | 12.3 | 7 | 4 |" in cost.map_time({"rows": rows, **MADE})


def test_only_the_part_between_the_markers_changes(tmp_path):
    rows = [{"shape": "llama 1024 / 4096", "seconds": 12.34, "sites": 7, "folds": 4}]
    (tmp_path / "map-time.json").write_text(json.dumps({"rows": rows, **MADE}))
    text = "before\n<!-- results: map-time -->\noutdated\n<!-- /results -->\nafter\n"
    once = table.with_results(text, tmp_path)
    assert once.startswith("before\n<!-- results: map-time -->\n") and once.endswith("\n<!-- /results -->\nafter\n")
    assert "12.3" in once and "outdated" not in once
    assert table.with_results(once, tmp_path) == once


def test_a_table_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="names no table"):
        table.with_results("<!-- results: nothing -->\n<!-- /results -->", tmp_path)


def test_the_headline_sets_every_method_beside_its_baseline_and_misses_no_row_silently():
    results: dict[str, dict[str, Any]] = {
        line.file: {"model": "m", "dense": DENSE, "rows": [], **MADE} for line in summary.LINES
    }
    with pytest.raises(KeyError, match="no row"):
        summary.summary(results)
    for line in summary.LINES:
        results[line.file]["rows"] += [
            {**line.row, "perplexity": [60.0, 70.0]},
            {**line.naive_row, "perplexity": [100.0]},
        ]
    shown = summary.summary(results)
    assert "| 50 % unstructured sparsity | `sparsegpt` | ×1.300 | magnitude: ×2.000 |" in shown
    assert "| `awq` → `gptq` | ×1.300 | rtn: ×2.000 |" in shown and "51,100 tokens" in shown
