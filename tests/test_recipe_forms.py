"""A recipe may be written in many forms; all say the same and none is less strict than a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmcompress import CompressError, Recipe
from llmcompress.passes import AWQ, GPTQ
from llmcompress.passes.base import PASSES
from llmcompress.presets import as_recipe, load_preset, preset_names, preset_path

YAML = "calibration: {samples: 8}\npasses:\n  - awq: {scheme: int4_g32, round: false}\n  - gptq: {scheme: int4_g32}\n"
AS_DICT: dict[str, Any] = {
    "calibration": {"samples": 8},
    "passes": [{"awq": {"scheme": "int4_g32", "round": False}}, {"gptq": {"scheme": "int4_g32"}}],
}
OBJECTS = [AWQ(scheme="int4_g32", round=False), GPTQ(scheme="int4_g32")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(YAML)
    (tmp_path / "recipe.json").write_text(json.dumps(AS_DICT, indent=2))
    return tmp_path / "recipe.yaml"


def test_every_form_says_the_same(file: Path) -> None:
    expected = as_recipe(file)
    forms: list[Any] = [
        str(file),
        file.with_suffix(".json"),
        str(file.with_suffix(".json")),
        YAML,
        json.dumps(AS_DICT),
        AS_DICT,
        {**AS_DICT, "passes": OBJECTS},
        {**AS_DICT, "passes": (OBJECTS[0], AS_DICT["passes"][1])},
        expected,
    ]
    assert [as_recipe(form) == expected for form in forms] == [True] * len(forms)
    passes = [as_recipe(form).passes for form in (OBJECTS, AS_DICT["passes"], tuple(OBJECTS))]
    assert all(each == expected.passes for each in passes)
    assert as_recipe(GPTQ()).passes == as_recipe(["gptq"]).passes == (GPTQ(),)
    assert as_recipe("passes: [gptq]") == as_recipe(GPTQ())


@pytest.mark.parametrize("preset", preset_names()[::9])
def test_it_comes_back_from_dictionary_json_and_yaml(preset: str) -> None:
    recipe = load_preset(preset)
    assert as_recipe(preset) == as_recipe(preset_path(preset)) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert as_recipe(recipe.to_json()).hash() == recipe.hash()


@pytest.mark.parametrize(
    ("form", "code"),
    [
        ({"passes": []}, "recipe.no-passes"),
        ({"passes": ["gpqt"]}, "recipe.unknown-pass"),
        ({"passes": [{"gptq": {"schema": "int4_g32"}}]}, "recipe.unknown-key"),
        ({"passes": ["gptq"], "seed": "1"}, "recipe.type"),
        ({"passes": ["gptq"], "seed": float("nan")}, "recipe.type"),
        ({"passes": ["gptq"], "model": object()}, "recipe.type"),
        ({"passes": [GPTQ(), {"wanda": {"sparsity": 0.5}}]}, "recipe.order"),
        ([GPTQ(), "gptq"], "recipe.order"),
        ('{"passes": ["gptq"], "passes": ["rtn"]}', "recipe.duplicate-key"),
        ("w5", "preset.unknown"),
        ("missing.json", "recipe.unreadable"),
        (3, "recipe.type"),
    ],
)
def test_no_form_is_less_strict_than_a_file(form: Any, code: str) -> None:
    with pytest.raises(CompressError) as refused:
        as_recipe(form)
    assert refused.value.code == code


def test_json_that_is_none_is_told_so() -> None:
    for text in ("{'passes': []}", "[1]", '{"a": 1, "a": 2}'):
        with pytest.raises(CompressError) as refused:
            Recipe.from_json(text)
        assert refused.value.code in ("recipe.json", "recipe.duplicate-key")


def test_settings_change_every_form(file: Path) -> None:
    for form in (file, YAML, AS_DICT, as_recipe(file), load_preset("tiny/gptq")):
        assert as_recipe(form, settings=["calibration.samples=3"]).calibration.samples == 3


def test_every_pass_can_be_imported_by_the_name_of_its_class() -> None:
    import llmcompress.passes

    names = {PASSES[name].__name__ for name in PASSES}
    assert set(dir(llmcompress.passes)) >= names and len(names) == len(list(PASSES))
    assert all(getattr(llmcompress.passes, PASSES[name].__name__) is PASSES[name] for name in PASSES)
    with pytest.raises(AttributeError, match="GPTQ"):
        _ = llmcompress.passes.GPTX
