"""What is answered without PyTorch: lists, schemas, and mistakes, which are told in the words of the full check."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_inputs import mutations, write_recipes

from llmcompress.errors import CompressError
from llmcompress.presets import preset_names, preset_path
from llmcompress.recipe import parse_recipe
from llmcompress.recipe.catalogue import FILE, Catalogue, as_json, catalogue, catalogue_of_classes, written_catalogue
from llmcompress.recipe.document import read_document, read_file

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def written() -> Catalogue:
    return written_catalogue()


def test_the_catalogue_is_what_the_classes_say():
    assert FILE.read_text() == as_json(catalogue_of_classes()), "run scripts/write_catalogue.py"


def test_classes_that_are_imported_speak_for_themselves():
    assert catalogue() == catalogue_of_classes()


def test_lists_schemas_and_mistakes_take_no_torch(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("passes: [gptq: {dampign: 0.1}]\n")
    (tmp_path / "good.yaml").write_text("passes: [rtn]\nevaluate: {perplexity: [missing.txt]}\n")
    (tmp_path / "torn.yaml").write_text("passes: [rtn\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    commands = [
        (["passes"], 0),
        (["passes", "gptq"], 0),
        (["passes", "gptqq"], 2),
        (["schema"], 0),
        (["recipes", "ls"], 0),
        (["recipes", "show", "w4"], 0),
        (["compress", "m/m", "--preset", "nosuch", "-o", "out"], 2),
        (["compress", "m/m", "--recipe", "missing.yaml", "-o", "out"], 2),
        (["compress", "m/m", "--recipe", "torn.yaml", "-o", "out"], 2),
        (["compress", "m/m", "--recipe", "r.yaml", "-o", "out"], 2),
        (["compress", "m/m", "--preset", "w4", "-o", "out", "--set", "passes.gptq.dampign=1"], 2),
        (["compress", "m/m", "--preset", "w4", "-o", "full"], 2),
        (["compress", "m/m", "--recipe", "good.yaml", "-o", "out"], 3),
        (["compress", "./nosuch", "--preset", "w4", "-o", "out"], 2),
        (["compress", "builtin:nosuch", "--preset", "w4", "--dry-run"], 2),
        (["allocate", "m/m", "--recipe", "r.yaml"], 2),
        (["evaluate", "m/m", "--perplexity", "./missing.txt"], 3),
        *(([name, "./nosuch"], 2) for name in ("evaluate", "footprint", "inspect", "speed")),
    ]
    program = f"""
import os, sys
from llmcompress.cli.main import main
os.chdir({str(tmp_path)!r})
for command, code in {commands!r}:
    try:
        main(command)
    except SystemExit as exit:
        assert exit.code == code, (command, exit.code)
    heavy = {{"torch", "transformers", "datasets", "numpy"}} & set(sys.modules)
    assert not heavy, (command, heavy)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "did you mean `damping`?" in done.stderr and "loading" not in done.stderr


def test_what_the_full_check_accepts_the_early_one_does(written: Catalogue):
    for name in preset_names():
        written.checked(read_file(preset_path(name)))


def test_damaged_recipes_end_well_or_in_a_refusal(written: Catalogue, tmp_path: Path):
    write_recipes(tmp_path)
    ended = set()
    for mutation in mutations(tmp_path, count=300, seed=5, files=("recipe.yaml",)):
        try:
            written.checked(read_document(mutation.content, "r.yaml"))
            ended.add("fine")
        except CompressError as refusal:
            ended.add(refusal.code)
    assert {"fine", "recipe.type", "recipe.unknown-pass", "recipe.yaml"} <= ended


MISTAKES = [
    "passes: [gptq: {dampign: 1}]",
    "passes: [gptq: {damping: 0}]",
    "passes: [rtn: {range: max}]",
    "passes: [gptqq]",
    "passes: [rtn: 3]",
    "passes: {rtn: {}}",
    "pases: [rtn]",
    "passes: [rtn]\nseed: yes",
    "passes: [rtn]\ncalibration: {samples: 0}",
    "passes: [rtn]\ncalibration: {smaples: 1}",
    "passes: [rtn]\nsave: {format: gguf, max_shard_size: 5}",
    "passes: [rtn]\nevaluate: {perplexity: wikitext2}",
    "passes: [rtn]\nevaluate: {kl: [x]}",
    "passes: [recover: {training: {steps: -1}}]",
    "passes: [rtn: {overrides: {'*.q_proj': {sites: x}}}]",
    "passes: [rtn: {overrides: {'*.q_proj': {range: max}}}]",
]


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_told_early_in_the_words_of_the_full_check(written: Catalogue, text: str):
    with pytest.raises(CompressError) as full:
        parse_recipe(text, "r.yaml")
    with pytest.raises(CompressError) as early:
        written.checked(read_document(text, "r.yaml"))
    assert str(early.value) == str(full.value)


def test_the_early_check_refuses_nothing_that_the_full_one_accepts(written: Catalogue):
    choose = random.Random(0)
    values = ["0", "1", "-1", "0.5", "true", "null", "x", "[1]", "{a: 1}", "''", "int4_g32", "'*'"]
    early_only, refused = [], 0
    for name in choose.choices(list(written.passes), k=60):
        option = choose.choice(list(written.options(name)))
        text = f"passes: [{name}: {{{option}: {choose.choice(values)}}}]"
        try:
            written.checked(read_document(text, "r.yaml"))
        except CompressError as early:
            refused += 1
            try:
                parse_recipe(text, "r.yaml")
                early_only.append(text)
            except CompressError as full:
                assert (early.code, early.where, early.what) == (full.code, full.where, full.what), text
    assert not early_only and refused > 10
