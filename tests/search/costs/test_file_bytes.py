"""Bytes of a plan are those of the files that `compress` writes for its recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmcompress.errors import CompressError
from llmcompress.evaluation.footprint import bytes_on_disk
from llmcompress.known_model import KnownModel, known_model
from llmcompress.loading.source import find_source
from llmcompress.pipeline import compress
from llmcompress.plan_search.costs.file_bytes import bytes_of, with_settled_format
from llmcompress.plan_search.plan_recipe import recipe_of
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.space import Space
from tests.tiny_folder import write_tiny_llama

SITES = {
    "dense": [],
    "int8": [{"rtn": {"scheme": "int8_channel"}}],
    "int4": [{"rtn": {"scheme": "int4_g16"}}],
    "half": [{"magnitude": {"sparsity": 0.5}}],
}
BODIES = {"whole": [], "narrow": [{"width": {"fraction": 0.25, "heads": False, "score": "l2", "refit": "none"}}]}
AFTER = {"none": [], "rounded": [{"embeddings": {"embedding": "int8_channel"}}]}
SETTINGS = {"evaluate": {}, "guard": {"windows": 0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), **sizes)


@pytest.fixture(scope="module")
def known(folder: Path) -> KnownModel:
    return known_model(find_source(str(folder)))


def _space(known: KnownModel, **choices: object) -> PlanSpace:
    return PlanSpace(Space.model_validate({"sites": SITES, **choices}), known.map)


def _written(folder: Path, output: Path, space: PlanSpace, plan: Plan, settings: dict[str, object]) -> int:
    compress(str(folder), recipe_of(space, plan, settings), output)
    return bytes_on_disk(output)


def test_a_random_plan_takes_as_many_bytes_as_its_files(folder: Path, known: KnownModel, tmp_path: Path) -> None:
    space = _space(known, bodies=BODIES, after=AFTER, most_dropped=0.4)
    settings = with_settled_format(space, known, SETTINGS)
    bytes_ = bytes_of(space, known, settings)
    for seed in range(4):
        plan = space.random(np.random.default_rng(seed))
        written = _written(folder, tmp_path / str(seed), space, plan, settings)
        assert bytes_.total(space, plan) == pytest.approx(written, rel=1e-3), space.chosen(plan)


def test_compressed_tensors_holds_a_space_of_common_schemes(folder: Path, known: KnownModel, tmp_path: Path) -> None:
    sites = {"int8": [{"rtn": {"scheme": "int8_channel"}}], "int4": [{"rtn": {"scheme": "int4_g32"}}]}
    space = _space(known, sites=sites)
    settings = with_settled_format(space, known, SETTINGS)
    assert settings["save"]["format"] == "compressed-tensors"
    plan = space.random(np.random.default_rng(0))
    written = _written(folder, tmp_path / "out", space, plan, settings)
    assert bytes_of(space, known, settings).total(space, plan) == pytest.approx(written, rel=1e-3)


def test_shapes_of_their_own_need_our_format(known: KnownModel) -> None:
    settings = with_settled_format(_space(known, bodies=BODIES), known, SETTINGS)
    assert settings["save"]["format"] == "llmcompress"


def test_a_format_that_depends_on_the_plan_is_refused(known: KnownModel) -> None:
    with pytest.raises(CompressError, match="depends on the whole plan"):
        bytes_of(_space(known), known, SETTINGS)


def test_a_choice_that_changes_all_linears_is_refused(known: KnownModel) -> None:
    space = _space(known, before={"none": [], "sliced": [{"slicegpt": {"fraction": 0.1}}]})
    with pytest.raises(CompressError, match="search on the result"):
        bytes_of(space, known, with_settled_format(space, known, SETTINGS))


def test_a_body_that_data_decide_is_refused(known: KnownModel) -> None:
    space = _space(known, bodies={"whole": [], "any": [{"width": {"fraction": 0.25, "allocation": "global"}}]})
    with pytest.raises(CompressError, match="depends on data"):
        bytes_of(space, known, {**SETTINGS, "save": {"format": "llmcompress"}})


def test_factors_and_branches_are_tried_once_and_counted(folder: Path, known: KnownModel, tmp_path: Path) -> None:
    branch = {"low_rank_correction": {"quantizer": {"rtn": {"scheme": "int4_g16"}}, "rank": 4}}
    sites = {"dense": [], "factored": [{"svd": {"rank": 24, "whitening": "none"}}], "branched": [branch]}
    space = _space(known, sites=sites, bodies=BODIES)
    settings = with_settled_format(space, known, {**SETTINGS, "calibration": {"samples": 2, "tokens": 16}})
    narrow, *rest = space.bodies
    plan = space.plan(
        {f"{space.units[narrow].name} (body)": "narrow"}
        | {space.units[index].name: "factored" for index in (*space.inside(narrow), *space.inside(rest[0]))[2:6]}
        | {space.units[index].name: "branched" for index in space.inside(rest[1])}
    )
    written = _written(folder, tmp_path / "out", space, plan, settings)
    assert bytes_of(space, known, settings).total(space, plan) == pytest.approx(written, rel=1e-3)
