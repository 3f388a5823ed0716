"""Recipes: traps of YAML, typos, order of passes, round trips. Every message names the place and what to write."""

import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from llmcompress.errors import CompressError, ExitCode
from llmcompress.passes.base import PASSES
from llmcompress.presets import as_recipe, load_preset, preset_names, preset_path
from llmcompress.recipe import Recipe, check_order, check_sites, parse_recipe, read_recipe
from llmcompress.recipe.document import read_document, write_yaml

ROOT = Path(__file__).parent.parent
SITES = tuple(
    f"model.layers.{block}.{site}"
    for block in range(2)
    for site in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
)


def refusal(text: str | bytes, *settings: str) -> CompressError:
    with pytest.raises(CompressError) as caught:
        parse_recipe(text, "r.yaml", settings=settings)
    assert caught.value.exit_code is ExitCode.USAGE
    return caught.value


# ---- typos and types (C1, C3)


@pytest.mark.parametrize(
    ("text", "code", "where", "fix"),
    [
        ("passes:\n  - gptq: {dampng: 0.1}", "recipe.unknown-key", "r.yaml line 2 (passes.0.gptq.dampng)", "`damping`"),
        ("passes: [rtn]\nevalute: {}", "recipe.unknown-key", "r.yaml line 2 (evalute)", "`evaluate`"),
        ("passes: [rtn]\ncalibration:\n  sample: 4", "recipe.unknown-key", "r.yaml line 3", "`samples`"),
        ("passes:\n  - gtpq", "recipe.unknown-pass", "r.yaml line 2 (passes.0)", "`gptq`"),
        ("passes: [rtn]\nrevision: 1234567", "recipe.type", "r.yaml line 2", '`revision: "1234567"`, in quotes'),
        ("passes: [rtn]\nrevision: 1e10", "recipe.type", "r.yaml line 2", '`revision: "1e10"`, in quotes'),
        ("passes: [rtn]\ncalibration: {samples: 4_0}", "recipe.type", "r.yaml line 2", "`samples: 40`"),
        ("passes: [rtn]\ncalibration: {samples: 40.0}", "recipe.type", "r.yaml line 2", "`samples: 40`"),
        ("passes: [rtn]\ncalibration: {samples: '40'}", "recipe.type", "r.yaml line 2", "`samples: 40`"),
        ("passes: [rtn]\nseed: true", "recipe.type", "r.yaml line 2 (seed)", "a whole number"),
        ("passes: [rtn]\nseed: -1", "recipe.value", "r.yaml line 2 (seed)", "change the value"),
        ("passes: [gptq: {act_order: no}]", "recipe.type", "r.yaml line 1", "`act_order: false`"),
        ("passes: [gptq: {damping: '1e-2'}]", "recipe.type", "r.yaml line 1", "`damping: 1e-2`"),
        ("passes: [gptq: {damping: .inf}]", "recipe.type", "r.yaml line 1", "a number"),
        ("passes: [gptq: {damping: 1e999}]", "recipe.value", "r.yaml line 1", "finite"),
        ("passes: [rtn]\nsave: {format: plian}", "recipe.value", "r.yaml line 2 (save.format)", "`plain`"),
        ("passes: [rtn]\nsave: {max_shard_size: 5Gb}", "recipe.value", "r.yaml line 2", "`max_shard_size: 5GB`"),
        ("passes: [rtn: {scheme: int9_g3}]", "scheme.unknown", "r.yaml line 1 (passes.0.rtn.scheme)", "int4_g128"),
        ("passes: [rtn]\nevaluate: {perplexity: a.txt}", "recipe.type", "r.yaml line 2", "`perplexity: [a.txt]`"),
        ("passes: [rtn]\nevaluate: {tasks: [{limit: 3}]}", "recipe.missing", "r.yaml line 2", "`task:`"),
        ("passes: [rtn]\ncalibration: 3", "recipe.type", "r.yaml line 2 (calibration)", "samples"),
        ("passes: [rtn]\ncalibration:", "recipe.type", "r.yaml line 2 (calibration)", "remove the key"),
        ("passes: rtn", "recipe.type", "r.yaml line 1 (passes)", "`passes: [rtn]`"),
        ("passes: {rtn: {}}", "recipe.type", "r.yaml line 1 (passes)", "`- `"),
        ("model: m", "recipe.missing", "r.yaml (passes)", "`passes:`"),
        (
            "passes: [rtn]\ngptq: {scheme: int4_g32}",
            "recipe.unknown-key",
            "line 2 (gptq)",
            "under `passes:`, as `  - gptq`",
        ),
        ("passes:\n  - rtn: 3", "recipe.type", "r.yaml line 2 (passes.0.rtn)", "`rtn: {option: value}`"),
        ("passes:\n  - rtn:\n    scheme: int8_channel", "recipe.type", "r.yaml line 2", "indent the options"),
        ("passes: [{rtn: {}, gptq: {}}]", "recipe.type", "r.yaml line 1 (passes.0)", "as its own item"),
        ("passes: [rtn]\nevaluate: {perplexty: []}", "recipe.unknown-key", "r.yaml line 2", "`perplexity`"),
        ("passes: [rtn]\nevaluate: [a.txt]", "recipe.type", "r.yaml line 2 (evaluate)", "perplexity"),
        ("passes:\n  - gptq: {overrides: {'*.a': {blok: 2}}}", "recipe.unknown-key", "overrides.*.a.blok", "`block`"),
        ("passes:\n  - gptq: {overrides: {'*.a': {block: 1.5}}}", "recipe.type", "overrides.*.a.block", "whole number"),
        ("passes:\n  - gptq: {overrides: {'*.a': {sites: x}}}", "recipe.override", "overrides.*.a.sites", "remove"),
        (
            "passes:\n  - gptq: {overrides: {'*.a': {scheme: int9}}}",
            "scheme.unknown",
            "overrides.*.a.scheme",
            "int{2…8}_",
        ),
    ],
)
def test_a_mistake_is_refused_with_line_and_what_to_write(text, code, where, fix):
    error = refusal(text)
    assert error.code == code
    assert where in error.where
    assert fix in error.fix


def test_scientific_numbers_are_numbers_and_names_stay_text():
    recipe = parse_recipe("passes: [gptq: {damping: 1e-4}]\nmodel: no\nrevision: 00123", "r.yaml")
    assert recipe.passes[0].damping == 1e-4
    assert (recipe.model, recipe.revision) == ("no", "00123")


def test_every_problem_is_told_the_first_in_the_file_first():
    error = refusal("passes: [rtn]\ncalibration:\n  sampels: 3\n  tokens: 4_0\nsave: {dtype: fp8}")
    assert "sampels" in error.what and "did you mean `samples`?" in error.fix
    assert "line 4" in error.fix and "line 5" in error.fix


# ---- YAML itself (C2, B5, B6)


def test_a_key_written_twice_names_both_lines():
    error = refusal("seed: 1\npasses: [rtn]\nseed: 2")
    assert error.code == "recipe.duplicate-key"
    assert "lines 1 and 3" in error.what


def test_a_tag_is_refused_with_its_line_and_runs_nothing(tmp_path):
    canary = tmp_path / "canary"
    error = refusal(f"model: m\npasses: !!python/object/apply:os.system ['touch {canary}']")
    assert error.code == "recipe.tag" and "line 2" in error.where and "!!python/object/apply:os.system" in error.what
    assert not canary.exists()


BOMBS = {
    "aliases": "a: &a [x,x]\n" + "".join(f"{k}: &{k} [*{j},*{j},*{j}]\n" for j, k in pairwise("abcdefghijkl")),
    "alias of itself": "passes: &a [*a]",
    "depth": "[" * 100_000,
    "bytes": "passes: [rtn]\n#" + "x" * 1_000_000,
    "values": "passes: [" + "a," * 400_000 + "]",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_recipe_built_to_exhaust_memory_is_refused_at_once(name):
    started = time.monotonic()
    assert refusal(BOMBS[name]).code == "recipe.too-large"
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "text",
    ["passes: [rtn", "a: b: c", "- rtn", "1: 2", "? [x]\n: 1", "a: 1\n---\nb: 2", "a: *nowhere", b"a: \xff", "a: \0"],
)
def test_what_is_no_plain_mapping_is_refused(text):
    assert refusal(text).code == "recipe.yaml"


def test_an_empty_file_says_what_to_write():
    assert "passes:" in refusal("# nothing\n").fix


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CompressError, match="No such file") as caught:
        read_recipe(tmp_path / "none.yaml")
    assert caught.value.code == "recipe.unreadable" and "none.yaml" in caught.value.where


@pytest.mark.parametrize(
    "value",
    ["no", "4_0", "1e-4", "null", "~", "", "0123", "2024-01-01", "a: b", "[x]", "true", "12", ".5", "é\n\n x", "!x"],
)
def test_any_text_survives_writing_and_reading(value):
    assert read_document(write_yaml({"a": value, "b": [value]}), "x").data == {"a": value, "b": [value]}


def test_the_dumper_and_a_stock_reader_agree_on_what_a_resolved_recipe_says():
    recipe = load_preset("tiny/gptq")
    assert yaml.safe_load(recipe.to_yaml()) == recipe.model_dump(mode="json")


# ---- round trips, hash


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_read_and_comes_back_from_its_own_yaml(name):
    recipe = load_preset(name)
    again = parse_recipe(recipe.to_yaml(), "again")
    assert again == recipe and again.hash() == recipe.hash()
    assert (recipe.model == "builtin:books-llama") == name.startswith("tiny/")
    assert preset_path(name).read_text().startswith("# ")


def test_configs_hold_no_yaml_that_is_not_a_preset():
    found = {path for kind in ("recipes", "tiny") for path in (ROOT / "configs" / kind).rglob("*.y*ml")}
    assert found == {preset_path(name) for name in preset_names()}


def test_every_pass_is_shown_by_a_tiny_preset():
    used = {PASSES.name_of(type(each)) for name in preset_names() for each in load_preset(name).passes}
    assert used == set(PASSES)


@pytest.mark.parametrize("name", list(PASSES))
def test_default_options_survive_yaml(name):
    recipe = Recipe(passes=(PASSES[name](),))
    assert parse_recipe(recipe.to_yaml(), "x") == recipe == parse_recipe(f"passes: [{name}]", "x")


def test_the_hash_follows_what_changes_the_weights_and_nothing_else():
    plain = "passes: [gptq: {scheme: int4_g32}]"
    base = parse_recipe(plain, "r").hash()
    assert len(base) == 16 and int(base, 16) >= 0
    assert parse_recipe(plain + "\nevaluate: {perplexity: []}", "r").hash() == base
    for setting in ("evaluate.perplexity=[a.txt]", "save.max_shard_size=1MB", "save.zero_points=packed"):
        assert parse_recipe(plain, "r", settings=[setting]).hash() == base, setting
    for setting in ("seed=1", "passes.gptq.damping=0.02", "calibration.batch=4", "model=m", "save.dtype=float32"):
        assert parse_recipe(plain, "r", settings=[setting]).hash() != base


def test_short_and_long_forms_mean_the_same():
    short = parse_recipe("passes: [gptq: {sites: '*_proj'}]\nevaluate: {perplexity: [wikitext2:validation]}", "r")
    long = parse_recipe(
        "passes:\n- gptq:\n    sites: ['*_proj']\nevaluate:\n  perplexity:\n  - {source: wikitext2, split: validation}",
        "r",
    )
    assert short == long


@pytest.mark.parametrize(
    ("text", "source", "split"),
    [
        ("builtin:evaluation", "builtin:evaluation", "test"),
        ("wikitext2", "wikitext2", "test"),
        ("org/name:train[:1%]", "org/name", "train[:1%]"),
        ("C:/texts/a.txt", "C:/texts/a.txt", "test"),
        ("a.txt", "a.txt", "test"),
    ],
)
def test_a_text_may_be_written_as_source_and_split(text, source, split):
    task = parse_recipe(f"passes: [rtn]\nevaluate: {{perplexity: ['{text}']}}", "r").evaluate[0]
    assert (task.source, task.split) == (source, split)


# ---- trust


def test_trust_without_a_commit_is_a_recipe_for_a_local_folder_and_the_hub_asks_for_one():
    """That a Hub id needs a full commit is shown in tests/loading/test_source.py."""
    assert parse_recipe("passes: [rtn]\nmodel: ./folder\ntrust_remote_code: true", "r").trust_remote_code


def test_a_recipe_without_passes_is_refused_with_its_line():
    error = refusal("model: m\npasses: []")
    assert error.code == "recipe.no-passes" and "line 2" in error.where and "rtn" in error.fix


def test_a_pinned_revision_is_not_carried_to_another_model():
    recipe = parse_recipe("passes: [rtn]\nmodel: a/b\nrevision: main", "r")
    assert recipe.for_model(None) is recipe and recipe.for_model("a/b") == recipe
    with pytest.raises(CompressError, match="pins revision main of a/b"):
        recipe.for_model("c/d")
    with pytest.raises(CompressError, match="no model"):
        parse_recipe("passes: [rtn]", "r").for_model(None)


# ---- order (C5)


@pytest.mark.parametrize(
    ("passes", "fix"),
    [
        ("[awq, gptq]", "`awq: {round: false}`"),
        ("[gptq, awq]", "put `awq: {round: false}` before gptq"),
        ("[gptq, smoothquant]", "put smoothquant before gptq"),
        ("[gptq, awq: {round: false}]", "before gptq"),
        ("[rtn, rtn]", "different `sites`"),
        ("[rtn: {sites: '*.q_proj'}, gptq]", "different `sites`"),
        ("[rtn, smoothquant: {sites: '*.q_proj'}]", "put smoothquant before rtn"),
        ("[rtn: {exclude: '*.a'}, gptq: {exclude: ['*.a', '*.b']}]", "different `sites`"),
    ],
)
def test_a_pass_that_would_change_codes_is_refused_when_the_recipe_is_read(passes, fix):
    error = refusal(f"passes: {passes}")
    assert error.code == "recipe.order"
    assert "passes.0." in error.what and "passes.1." in error.what
    assert fix in error.fix


@pytest.mark.parametrize(
    "passes",
    [
        "[smoothquant, gptq]",
        "[awq: {round: false}, gptq]",
        "[gptq: {sites: '*.down_proj'}, rtn: {exclude: '*.down_proj'}]",
        "[rtn: {sites: '*.q_proj'}, gptq: {sites: '*.o_proj'}]",
    ],
)
def test_passes_that_do_not_meet_may_follow_each_other(passes):
    found = parse_recipe(f"passes: {passes}", "r").passes
    check_order(found, SITES)
    check_sites(found, SITES)


def test_an_overlap_that_only_the_model_shows_names_the_site():
    passes = parse_recipe("passes: [gptq: {sites: '*.down_proj'}, rtn: {sites: '*_proj'}]", "r").passes
    with pytest.raises(CompressError) as caught:
        check_order(passes, SITES)
    assert caught.value.code == "recipe.order"
    assert caught.value.where == "passes.1.rtn, site model.layers.0.mlp.down_proj"


def test_an_override_decides_whether_a_site_holds_codes():
    text = "passes: [awq: {overrides: {'*.down_proj': {round: false}}}, gptq: {sites: '*.down_proj'}]"
    check_order(parse_recipe(text, "r").passes, SITES)


# ---- globs


@pytest.mark.parametrize(
    ("options", "where", "fix"),
    [
        ("sites: '*.dwn_proj'", "passes.0.rtn.sites", "`*.down_proj`"),
        ("exclude: '*.lm_head'", "passes.0.rtn.exclude", "`*.q_proj`"),
        ("overrides: {'*.up': {scheme: int8_channel}}", "passes.0.rtn.overrides", "`*.up_proj`"),
        ("exclude: '*.up_proj', overrides: {'*.up_proj': {scheme: int8_channel}}", "passes.0.rtn.overrides", "_proj`"),
        ("exclude: '*'", "passes.0.rtn", "exclude fewer"),
    ],
)
def test_a_glob_without_a_site_is_refused_with_the_nearest_names(options, where, fix):
    with pytest.raises(CompressError) as caught:
        check_sites(parse_recipe(f"passes: [rtn: {{{options}}}]", "r").passes, SITES)
    assert caught.value.code == "recipe.no-such-site"
    assert caught.value.where == where
    assert fix in caught.value.fix


# ---- --set

BASE = "passes:\n  - awq: {round: false}\n  - gptq\nevaluate: {perplexity: [wikitext2:test]}"


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("calibration.samples=3", "calibration.samples", 3),
        ("revision=1234567", "revision", "1234567"),
        ("model=null", "model", None),
        ("passes.1.gptq.damping=1e-3", "passes.1.gptq.damping", 1e-3),
        ("passes.gptq.scheme=int3_g32", "passes.1.gptq.scheme", "int3_g32"),
        ("passes.gptq={scheme: int3_g32}", "passes.1.gptq.scheme", "int3_g32"),
        ("passes.1=rtn", "passes.1.rtn.range", "minmax"),
        ("passes=[{rtn: {scheme: int4_g32}}]", "passes.0.rtn.scheme", "int4_g32"),
        ("passes.gptq.overrides.*.down_proj={block: 64}", "passes.1.gptq.overrides.*~down_proj.block", 64),
        ("passes.awq.sites=*.up_proj", "passes.0.awq.sites.0", "*.up_proj"),
        ("passes.awq.sites=[a, b]", "passes.0.awq.sites.1", "b"),
        ("passes.gptq.overrides.*.down_proj.block=64", "passes.1.gptq.overrides.*~down_proj.block", 64),
        ("evaluate.perplexity.0.window=64", "evaluate.perplexity.0.window", 64),
        ("evaluate.perplexity=[a.txt]", "evaluate.perplexity.0.source", "a.txt"),
        ("save.format=plain", "save.format", "plain"),
    ],
)
def test_set_writes_one_value_of_the_right_type(setting, path, value):
    found = parse_recipe(BASE, "r", settings=[setting]).model_dump(mode="json")
    for part in path.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part.replace("~", ".")]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("setting", "code", "fix"),
    [
        ("calibration.sampels=3", "recipe.set", "`samples`"),
        ("calibraton.samples=3", "recipe.set", "`calibration`"),
        ("passes.gptq.damp=1", "recipe.set", "`damping`"),
        ("passes.rtn.scheme=int4_g32", "recipe.set", "awq, gptq"),
        ("passes.0.gptq.scheme=int4_g32", "recipe.set", "use that name"),
        ("passes.gptq.overrides.*.down_proj.blok=64", "recipe.set", "`block`"),
        ("evaluate.perplexty=[a.txt]", "recipe.set", "`perplexity`"),
        ("evaluate.perplexity.0.windw=64", "recipe.set", "`window`"),
        ("passes.9.gptq.damping=1", "recipe.set", "count from 0"),
        ("seed.deep=1", "recipe.set", "single value"),
        ("seed", "recipe.set", "`calibration.samples=64`"),
        ("calibration.samples=4_0", "recipe.type", "`samples: 40`"),
        ("passes.gptq.act_order=no", "recipe.type", "`act_order: false`"),
        ("passes.gptq={a: [}", "recipe.yaml", "quotes"),
    ],
)
def test_set_refuses_what_leads_nowhere_and_names_the_setting(setting, code, fix):
    error = refusal(BASE, setting)
    assert error.code == code
    assert error.where.startswith("setting")
    assert fix in error.fix


def test_set_asks_which_pass_when_two_have_the_name():
    text = "passes: [rtn: {sites: '*.q_proj'}, rtn: {sites: '*.o_proj'}]"
    assert refusal(text, "passes.rtn.range=mse").fix == "say which: passes.0.rtn or passes.1.rtn"
    assert parse_recipe(text, "r", settings=["passes.1.rtn.range=mse"]).passes[1].range == "mse"


def test_set_reaches_into_the_options_of_an_inner_pass():
    setting = "passes.mixed_precision.quantizer.gptq.damping=0.02"
    (found,) = parse_recipe("passes: [mixed_precision]", "r", settings=[setting]).passes
    assert found.quantizer == {"gptq": {"damping": 0.02}}


# ---- presets


def test_an_unknown_preset_names_the_nearest(tmp_path):
    with pytest.raises(CompressError) as caught:
        load_preset("tiny/gtpq")
    assert caught.value.fix == "did you mean `tiny/gptq`?"
    with pytest.raises(CompressError):
        load_preset("../recipes/w4")


def test_a_recipe_may_be_given_as_itself_a_preset_or_a_file(tmp_path):
    recipe = load_preset("tiny/rtn")
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml())
    assert as_recipe(recipe) is recipe
    assert (
        as_recipe("tiny/rtn") == as_recipe(tmp_path / "mine.yaml") == as_recipe(str(tmp_path / "mine.yaml")) == recipe
    )
    assert as_recipe(recipe, settings=["seed=3"]).seed == 3


def test_every_yaml_block_of_the_documentation_is_a_recipe():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in text.split("```yaml\n")[1:]]
    assert blocks
    for block in blocks:
        parse_recipe(block, "docs/recipes.md")
