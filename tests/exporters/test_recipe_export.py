"""A recipe that names targets: refused before any work where one cannot hold the result, written beside the output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmcompress import compress, plan
from llmcompress.errors import CompressError
from llmcompress.recipe.reading import parse_recipe
from tests.tiny_folder import write_tiny_llama

RECIPE = "passes: [rtn: {scheme: int4_g32}]\nevaluate: {}\nexport: [gguf]"


def test_the_result_is_exported_beside_the_output_with_weights_in_memory_and_on_disk(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "source", intermediate_size=64)
    for offload in ("never", "always"):
        compress(source, parse_recipe(RECIPE, "r"), tmp_path / offload, offload=offload)
        report = json.loads((tmp_path / f"{offload}-gguf" / "export_report.json").read_text())
        assert report["read_back"] and not report["converted"]
        assert (report["runtime"] is None) == (offload == "always")
    first, second = (tmp_path / f"{name}-gguf" / "model.gguf" for name in ("never", "always"))
    assert first.read_bytes() == second.read_bytes()


def test_what_a_target_cannot_hold_is_refused_by_the_plan_with_the_nearest_scheme(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "source")  # 48 inputs of the down projection are no whole blocks
    with pytest.raises(CompressError, match="gguf cannot represent this model") as refused:
        plan(str(source), {"passes": [{"rtn": {"scheme": "int4_g16"}}], "export": ["gguf"]})
    assert "compress it with int4_channel" in refused.value.fix  # a row of 32 inputs is one block
    wide = write_tiny_llama(tmp_path / "wide", intermediate_size=64)
    found = plan(
        str(wide), {"passes": [{"rtn": {"scheme": "int4_g32_asym"}}], "export": [{"gguf": {"instead": "dense"}}]}
    )
    assert any(note.startswith("gguf: ") and "minima" in note for note in found.warnings)


def test_targets_are_read_with_their_options_and_are_no_part_of_the_hash() -> None:
    without = parse_recipe("passes: [rtn]", "r")
    found = parse_recipe("passes: [rtn]\nexport: [plain, gguf: {instead: Q8_0}]", "r")
    assert found.to_dict()["export"] == [{"plain": {}}, {"gguf": {"instead": "Q8_0", "ternary": "TQ2_0"}}]
    assert found.hash() == without.hash() and parse_recipe(found.to_yaml(), "r") == found
    with pytest.raises(CompressError, match="unknown exporter 'ggufx'"):
        parse_recipe("passes: [rtn]\nexport: [ggufx]", "r")
