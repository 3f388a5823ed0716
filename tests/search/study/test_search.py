"""A whole search on a tiny model: the front, recipes, models and report; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import llmcompress
from llmcompress.cli.main import llmcompress as command
from llmcompress.errors import CompressError, ExitCode
from llmcompress.plan_search.bench_judge import BenchJudge
from llmcompress.plan_search.from_study import recipe_from_study
from llmcompress.plan_search.joining import join
from llmcompress.plan_search.searching import as_search, search
from llmcompress.plan_search.settings import SearchSettings, read_search
from llmcompress.recipe import read_recipe
from llmcompress.records.report import read_report
from llmcompress.records.search import SearchReport
from tests.tiny_folder import write_tiny_llama

SEARCH: dict[str, Any] = {
    "calibration": {"samples": 4, "tokens": 32},
    "space": {
        "sites": {
            "int8": [{"rtn": {"scheme": "int8_g16"}}],
            "int4": [{"gptq": {"scheme": "int4_g16"}}],
            "int2": [{"gptq": {"scheme": "int2_g16"}}],
        },
        "most_dropped": 0.5,
    },
    "judge": {"stages": [64, 128]},
    "optimizer": {"evopress": {"trials": 12, "offspring": 4}},
    "limits": {"bytes": "0.9x"},
    "finish": {"compress": 1, "front": 4},
    "evaluate": {"perplexity": [{"source": "builtin:evaluation", "window": 48, "max_windows": 3}]},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return str(write_tiny_llama(folder, hidden_size=64, intermediate_size=128, num_hidden_layers=3))


@pytest.fixture(scope="module")
def study(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search, which tests only read."""
    folder = tmp_path_factory.mktemp("search") / "study"
    search(tiny, SEARCH, folder)
    return folder


def read(study: Path) -> SearchReport:
    return SearchReport.model_validate_json((study / "front.json").read_text())


def test_the_front_has_no_plan_that_another_beats_and_the_selected_one_keeps_the_limits(study: Path) -> None:
    found = read(study)
    points = [(each.loss, each.costs["bytes"]) for number in found.front for each in [found.trial(number)]]
    assert points and all(loss is not None for loss, _ in points)
    assert not [
        one for one in points if any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in points)
    ]
    assert found.selected in found.front
    assert (
        found.trial(found.selected).costs["bytes"] <= found.limits["bytes"] == pytest.approx(0.9 * found.dense["bytes"])
    )
    assert len({found.trial(number).tokens for number in found.front}) == 1


def test_a_model_of_the_search_has_the_planned_bytes_and_stands_beside_a_uniform_one(study: Path) -> None:
    found = read(study)
    assert found.made[0].trial == found.selected and any(each.uniform for each in found.made)
    for each in found.made:
        assert each.planned_bytes == pytest.approx(each.bytes, rel=1e-3)
        assert each.kl is not None and each.ratio_error is not None
        assert (
            read_report(Path(each.folder)).recipe_hash == read_recipe(study / "recipes" / f"{each.trial}.yaml").hash()
        )


def test_the_report_shows_front_plans_and_timeline(study: Path) -> None:
    page, text = ((study / "report" / name).read_text() for name in ("report.html", "report.md"))
    for title in ("The front", "Plans, layer by layer", "How the front grew", "What mattered", "Timeline"):
        assert title in page and title in text
    assert page.count("<svg") >= 5 and "<script" not in page
    assert "llmcompress compress --from" in page


def test_any_trial_becomes_a_recipe_and_the_command_makes_its_model(study: Path, tmp_path: Path) -> None:
    found = read(study)
    assert recipe_from_study(str(study)) == recipe_from_study(f"{study}:{found.selected}")
    other = next(each for each in found.trials if not (study / "recipes" / f"{each.number}.yaml").exists())
    written = recipe_from_study(f"{study}:{other.number}")
    assert written.model == found.model
    done = CliRunner().invoke(
        command,
        [
            "compress",
            "--from",
            f"{study}:{other.number}",
            "-o",
            str(tmp_path / "out"),
            "--set",
            "evaluate={}",
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    assert read_report(tmp_path / "out").bytes_compressed == pytest.approx(other.costs["bytes"], rel=1e-3)
    for named in (f"{study}:9999", f"{tmp_path}/nothing:1"):
        with pytest.raises(CompressError) as refused:
            recipe_from_study(named)
        assert refused.value.exit_code is ExitCode.USAGE


class Killed(BaseException):
    """As SIGKILL ends a process."""


def test_killed_and_started_again_the_command_ends_with_the_same_front(
    study: Path, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged, asked = BenchJudge.__call__, []

    def dying(judge: BenchJudge, plan: Any, tokens: int) -> Any:
        asked.append((plan, tokens))
        if len(asked) == 6:
            raise Killed
        return judged(judge, plan, tokens)

    monkeypatch.setattr(BenchJudge, "__call__", dying)
    quick = {**SEARCH, "finish": {"compress": 0, "front": 4}}
    with pytest.raises(Killed):
        search(tiny, quick, tmp_path / "study")
    again = search(tiny, quick, tmp_path / "study")
    whole = read(study)
    assert [again.trial(number).chosen for number in again.front] == [
        whole.trial(number).chosen for number in whole.front
    ]
    assert [again.trial(number).loss for number in again.front] == [whole.trial(number).loss for number in whole.front]
    assert asked.count(asked[0]) == 1 and len(asked) == len({*asked}) + 1, "only what was interrupted is judged again"


def test_g6_a_study_is_not_continued_with_other_settings_or_another_model(
    study: Path, tiny: str, tmp_path: Path
) -> None:
    for change, named in (
        ({"seed": 1}, "seed"),
        ({"limits": {"bytes": "0.8x"}}, "limits"),
        ({"calibration": {}}, "calibration"),
    ):
        with pytest.raises(CompressError) as refused:
            search(tiny, {**SEARCH, **change}, study)
        assert refused.value.code == "search.other-study" and named in refused.value.what
    other = write_tiny_llama(tmp_path / "other", hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    with pytest.raises(CompressError, match=r"identity\.weights"):
        search(str(other), SEARCH, study)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    with pytest.raises(CompressError, match="something else"):
        search(tiny, SEARCH, tmp_path / "mine")


def test_a_worker_of_another_host_makes_the_levels_once_more_and_leaves_when_the_search_is_over(
    study: Path, tmp_path: Path
) -> None:
    database = f"sqlite:///{study}/study.db"
    assert join(tmp_path / "host", database=database) == 0
    first, second = (json.loads((place / "levels" / "levels.json").read_text()) for place in (study, tmp_path / "host"))
    assert first == second
    with pytest.raises(CompressError, match="no study 'other'"):
        join(tmp_path / "other", database=database, name="other")
    with pytest.raises(CompressError, match=r"~/\.pgpass"):
        join(tmp_path / "other", database="postgresql+psycopg://me:secret@host/searches")


def test_g7_limits_that_no_plan_keeps_are_told_before_the_work_with_the_nearest_plan(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(json.dumps(SEARCH))
    arguments = [
        "search",
        tiny,
        "--space",
        str(tmp_path / "search.yaml"),
        "--fit",
        "1kB",
        "-o",
        str(tmp_path / "study"),
    ]
    done = CliRunner().invoke(command, arguments)
    refused = done.exception
    assert isinstance(refused, CompressError) and refused.exit_code is ExitCode.GATE
    assert "instead of 1 kB" in refused.what and not (tmp_path / "study" / "levels").exists()
    nearest = read_recipe(tmp_path / "study" / "nearest" / "0.yaml")
    assert "int2" in nearest.to_yaml() and "depth" in nearest.to_yaml()


def test_mistakes_of_a_search_file_are_told_with_line_and_fix(tmp_path: Path) -> None:
    for text, code in (
        ("optimizer: {evopres: {}}\nspace: {sites: {int4: [rtn]}}", "recipe.unknown-key"),
        ("optimizer: {evopress: {}}\nspace: {sites: {int4: [rtn]}}\nlimits: {bytes: much}", "search.amount"),
        ("optimizer: {evopress: {}, random: {}}\nspace: {sites: {int4: [rtn]}}", "recipe.value"),
        ("optimizer: {evopress: {}}\nspace: {sites: {int4: [rtn]}, per: blok}", "recipe.value"),
    ):
        (tmp_path / "search.yaml").write_text(text)
        with pytest.raises(CompressError) as refused:
            read_search(tmp_path / "search.yaml")
        assert refused.value.exit_code is ExitCode.USAGE and refused.value.code == code
    assert SearchSettings.model_validate_json(json.dumps(as_search(SEARCH).model_dump(mode="json"))) == as_search(
        SEARCH
    )


def test_the_package_is_the_function(tiny: str, study: Path, tmp_path: Path) -> None:
    assert callable(llmcompress.search)
    with pytest.raises(CompressError, match="other settings"):
        llmcompress.search(tiny, SEARCH, study, limits={"bytes": "0.5x"})
