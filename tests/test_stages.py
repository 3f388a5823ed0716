"""Stages: one annotated field of a recipe is read, set, written, described and hashed without another line of code."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from llmcompress.errors import CompressError
from llmcompress.passes.base import PASSES
from llmcompress.presets import preset_names, preset_path
from llmcompress.recipe import Recipe, json_schema, parse_recipe
from llmcompress.recipe.checking import check_document
from llmcompress.recipe.document import read_document
from llmcompress.recipe.stages import Grouped, LeavesWeights, Listed, stages_of
from llmcompress.registry import Registry


class Thing(BaseModel):
    """Something of a stage that is not there yet."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")


METHODS: Registry[Thing] = Registry("method", __name__)
PLACES: Registry[Thing] = Registry("place", __name__)


@METHODS.register("lora")
class Lora(Thing):
    rank: int = Field(8, ge=1)
    sites: tuple[str, ...] = ("*",)
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)


@METHODS.register("norms_only")
class NormsOnly(Thing):
    loss: Literal["kl", "labels"] = "kl"


@PLACES.register("hub")
class Hub(Thing):
    repository: str
    private: bool = True

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        """USER/NAME."""
        return {"repository": text}


class Longer(Recipe):
    recover: Annotated[tuple[Thing, ...], Listed(METHODS)] = ()
    deliver: Annotated[tuple[Thing, ...], Grouped(PLACES), LeavesWeights()] = ()


TEXT = "passes: [rtn]\nrecover:\n  - lora: {rank: 4, overrides: {'*.up': {rank: 2}}}\n  - norms_only\n"
BOTH = TEXT + "deliver: {hub: [me/small, {repository: me/open, private: false}]}\n"


def read(text: str, *settings: str) -> Longer:
    return check_document(read_document(text, "r.yaml"), Longer, settings=settings)


def refusal(text: str, *settings: str) -> CompressError:
    with pytest.raises(CompressError) as caught:
        read(text, *settings)
    return caught.value


def test_its_things_are_read_and_written_back():
    found = read(BOTH)
    assert found.recover == (Lora(rank=4, overrides={"*.up": {"rank": 2}}), NormsOnly())
    assert found.deliver == (Hub(repository="me/small"), Hub(repository="me/open", private=False))
    assert read(found.to_yaml()) == found
    assert Longer.model_validate(found.model_dump()) == Longer.model_validate_json(found.model_dump_json()) == found
    assert Longer(passes=found.passes, recover=[NormsOnly()]).recover == (NormsOnly(),)
    assert list(stages_of(Longer)) == ["data", "passes", "evaluate", "export", "publish", "recover", "deliver"]


@pytest.mark.parametrize(
    ("text", "code", "where", "fix"),
    [
        ("recover: [lorra]", "recipe.unknown-method", "line 1 (recover.0)", "`lora`"),
        ("recover: [lora: {rnk: 2}]", "recipe.unknown-key", "line 1 (recover.0.lora.rnk)", "`rank`"),
        ("recover: [lora: {rank: 0}]", "recipe.value", "recover.0.lora.rank", "change the value"),
        ("recover: [norms_only: {loss: kll}]", "recipe.value", "recover.0.norms_only.loss", "`kl`"),
        ("recover: [lora: {overrides: {'*.up': {rnk: 2}}}]", "recipe.unknown-key", "overrides.*.up.rnk", "`rank`"),
        ("recover: [lora: {overrides: {'*.up': {sites: x}}}]", "recipe.override", "overrides.*.up.sites", "remove"),
        ("recover: lora", "recipe.type", "line 1 (recover)", "`recover: [lora]`"),
        ("lora: {rank: 2}", "recipe.unknown-key", "line 1 (lora)", "under `recover:`, as `  - lora`"),
        ("deliver: {hubb: [me/x]}", "recipe.unknown-key", "line 1 (deliver.hubb)", "`hub`"),
        ("deliver: {hub: me/x}", "recipe.type", "line 1 (deliver.hub)", "`hub: [me/x]`"),
        ("deliver: {hub: [{private: 1}]}", "recipe.type", "deliver.hub.0.private", "true or false"),
        ("deliver: [hub]", "recipe.type", "line 1 (deliver)", "some of hub"),
        ("recovr: []", "recipe.unknown-key", "line 1 (recovr)", "`recover`"),
    ],
)
def test_a_mistake_in_it_names_line_and_what_to_write(text, code, where, fix):
    error = refusal(f"{text}\npasses: [rtn]")
    assert error.code == code
    assert where in error.where
    assert fix in error.fix


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("recover.lora.rank=16", ("recover", 0, "lora", "rank"), 16),
        ("recover.1.norms_only.loss=labels", ("recover", 1, "norms_only", "loss"), "labels"),
        ("recover.lora.overrides.*.up.rank=1", ("recover", 0, "lora", "overrides", "*.up", "rank"), 1),
        ("recover.0=norms_only", ("recover", 0, "norms_only", "loss"), "kl"),
        ("recover=[norms_only]", ("recover", 0, "norms_only", "loss"), "kl"),
        ("deliver.hub.0.private=false", ("deliver", "hub", 0, "private"), False),
        ("deliver.hub=[a/b]", ("deliver", "hub", 0, "repository"), "a/b"),
    ],
)
def test_set_leads_into_it(setting, path, value):
    found: Any = read(BOTH, setting).model_dump(mode="json")
    for part in path:
        found = found[part]
    assert found == value


@pytest.mark.parametrize(
    ("setting", "fix"),
    [
        ("recover.lorra.rank=1", "`lora`"),
        ("recover.lora.rnk=1", "`rank`"),
        ("recover.7.lora.rank=1", "count from 0"),
        ("deliver.hubb=[x]", "`hub`"),
        ("deliver.hub.0.privat=true", "`private`"),
    ],
)
def test_set_names_the_nearest_key_of_it(setting, fix):
    error = refusal(BOTH, setting)
    assert error.code == "recipe.set" and fix in error.fix and error.where == f"setting {setting}"


def test_the_hash_covers_it_unless_it_is_marked_as_leaving_the_weights():
    base = read(TEXT).hash()
    assert read(BOTH).hash() == base
    assert read(TEXT, "recover.lora.rank=5").hash() != base


def test_a_stage_that_a_recipe_does_not_have_is_an_unknown_key():
    with pytest.raises(CompressError) as caught:
        parse_recipe("passes: [rtn]\ndeliver: {hub: [me/x]}", "r.yaml")
    assert caught.value.code == "recipe.unknown-key"


# ---- the JSON Schema


def test_the_json_schema_describes_every_option_of_every_registered_thing():
    for kind, stage, registry in ((Recipe, "passes", PASSES), (Longer, "recover", METHODS)):
        options = json_schema(kind)["properties"][stage]["items"]["anyOf"][0]["properties"]
        assert set(options) == set(registry)
        for name in registry:
            assert set(options[name]["properties"]) == set(registry[name].model_fields)


@pytest.mark.parametrize("short", [True, False], ids=["as it is written", "every default written out"])
def test_every_preset_is_valid_by_the_json_schema(short):
    schema = json_schema()
    for name in preset_names():
        text = preset_path(name).read_text(encoding="utf-8")
        written = text if short else parse_recipe(text, name).to_yaml()
        assert not list(violations(schema, schema, read_document(written, name).data, name)), name


@pytest.mark.parametrize(
    "text",
    [
        "passes: [gtpq]",
        "passes: [gptq: {dampng: 1}]",
        "passes: [gptq: {damping: -1}]",
        "passes: [gptq: {overrides: {'*.a': {blok: 2}}}]",
        "passes: [{gptq: {}, rtn: {}}]",
        "passes: [rtn]\nevaluate: {perplexity: [{window: 1}]}",
        "passes: [rtn]\nsave: {format: plian}",
        "passes: [rtn]\nsave: {max_shard_size: 5Gb}",
        "seed: 1",
    ],
)
def test_the_json_schema_refuses_what_the_reader_refuses(text):
    schema = json_schema()
    assert list(violations(schema, schema, read_document(text, "x").data, ""))


KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}


def violations(root: dict[str, Any], schema: dict[str, Any], value: Any, at: str) -> Any:
    """What is wrong with a value by the keywords of JSON Schema that we use; a keyword nobody knows is an error."""
    if "$ref" in schema:
        yield from violations(root, root["$defs"][schema["$ref"].rpartition("/")[2]], value, at)
    for keyword, wanted in schema.items():
        yield from (f"{at}: {keyword}" for wrong in CHECKS[keyword](value, wanted) if wrong)
    if "anyOf" in schema and all(any(violations(root, each, value, at)) for each in schema["anyOf"]):
        yield f"{at}: no alternative fits"
    for index, item in enumerate(value if isinstance(value, list) else ()):
        yield from violations(root, schema.get("items", {}), item, f"{at}.{index}")
    known, extra = schema.get("properties", {}), schema.get("additionalProperties", True)
    for key, item in value.items() if isinstance(value, dict) else ():
        if key not in known and extra is False:
            yield f"{at}: {key} is unknown"
        elif inner := known.get(key, extra if isinstance(extra, dict) else {}):
            yield from violations(root, inner, item, f"{at}.{key}")


def _of_kind(value: Any, kind: str) -> bool:
    return (
        value is None
        if kind == "null"
        else isinstance(value, KINDS[kind]) and (kind == "boolean") >= (isinstance(value, bool))
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


CHECKS: dict[str, Any] = {
    "type": lambda value, kind: [not _of_kind(value, kind)],
    "enum": lambda value, words: [value not in words],
    "const": lambda value, word: [value != word],
    "required": lambda value, keys: [key not in value for key in keys if isinstance(value, dict)],
    "minProperties": lambda value, least: [isinstance(value, dict) and len(value) < least],
    "maxProperties": lambda value, most: [isinstance(value, dict) and len(value) > most],
    "minItems": lambda value, least: [isinstance(value, list) and len(value) < least],
    "minLength": lambda value, least: [isinstance(value, str) and len(value) < least],
    "pattern": lambda value, pattern: [isinstance(value, str) and not re.search(pattern, value)],
    "minimum": lambda value, least: [_number(value) and value < least],
    "maximum": lambda value, most: [_number(value) and value > most],
    "exclusiveMinimum": lambda value, least: [_number(value) and value <= least],
    "exclusiveMaximum": lambda value, most: [_number(value) and value >= most],
    **dict.fromkeys(
        ("title", "description", "default", "examples", "$schema", "$defs", "$ref", "anyOf", "items", "properties",
         "additionalProperties"),
        lambda value, anything: [],
    ),
}  # fmt: skip


ACCOUNTS: Registry[Thing] = Registry("account", __name__)


@ACCOUNTS.register("account")
class Account(Thing):
    """There is one, so it is written without a list."""

    only_one: ClassVar[bool] = True
    name: str = "me"


class WithAccount(Recipe):
    owner: Annotated[tuple[Thing, ...], Grouped(ACCOUNTS), LeavesWeights()] = ()


def with_account(text: str, *settings: str) -> WithAccount:
    return check_document(read_document(f"passes: [rtn]\nowner: {text}\n", "r.yaml"), WithAccount, settings=settings)


def test_what_there_is_one_of_is_written_without_a_list():
    found = with_account("{account: {name: you}}", "owner.account.name=us")
    assert found.owner == (Account(name="us"),)
    assert found.to_dict()["owner"] == {"account": {"name": "us"}}
    assert check_document(read_document(found.to_yaml(), "again"), WithAccount) == found
    assert json_schema(WithAccount)["properties"]["owner"]["properties"]["account"]["type"] == "object"
    with pytest.raises(CompressError, match="must be a mapping"):
        with_account("{account: [{name: you}]}")
    with pytest.raises(CompressError, match="`name`"):
        with_account("{account: {nam: you}}")
