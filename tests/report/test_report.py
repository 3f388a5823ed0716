"""A report is one file that asks no network for anything, trusts no text, and says the same in HTML, Markdown, JSON."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmcompress.errors import CompressError, ExitCode
from llmcompress.records.evaluation import Comparison, Evaluation
from llmcompress.report.comparing import as_comparison
from llmcompress.report.folder import read_reported, write_report
from llmcompress.report.kinds import lines
from llmcompress.report.plots import Point, pareto
from tests.report.example import EVIL, TOKEN, evaluation

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Collects what matters of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(evaluation(), tmp_path_factory.mktemp("single") / "report")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    both = Comparison(base="dense", evaluations=(evaluation(), evaluation(model="_other $x_1$")))
    return write_report(both, tmp_path_factory.mktemp("several") / "report")


@pytest.fixture(params=["single", "several"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_asks_no_network_and_runs_nothing(folder: Path) -> None:
    found = page(folder)
    assert not {"script", "link", "img", "iframe", "object", "embed", "use-external"} & set(found.tags)
    assert not [each for each in found.attributes if each[0].startswith("on")]
    links = [value for name, value in found.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert all(value.startswith("#") for value in links)
    style = re.findall(r"url\(([^)]*)\)|@import", (folder / "report.html").read_text(encoding="utf-8"))
    assert all(target.startswith("#") for target in style)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes


def test_text_of_models_is_shown_and_never_markup(folder: Path) -> None:
    found = page(folder)
    assert EVIL in found.text and "b" not in found.tags
    assert not found.open, "every element is closed"


def test_ids_are_unique_and_every_reference_is_there(folder: Path) -> None:
    found = page(folder)
    assert found.ids and len(found.ids) == len(set(found.ids))
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text)) <= set(found.ids)


def test_drawings_take_their_colours_from_the_page(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert drawings and all("<text" in each for each in drawings)
    colours = {colour for each in drawings for colour in re.findall(r"#[0-9a-f]{6}\b", each)}
    assert colours <= {"#000000", "#ffffff"}, "only matplotlib's unused defaults"


def test_nothing_of_the_user_leaves_with_it(folder: Path) -> None:
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        assert TOKEN not in text and str(Path.home()) not in text


def test_html_and_markdown_say_the_numbers_of_the_json(folder: Path) -> None:
    found = read_reported(folder)
    several = found.evaluations if isinstance(found, Comparison) else (found,)
    html, markdown = page(folder).text, (folder / "report.md").read_text(encoding="utf-8").replace("\\", "")
    for line in (line for each in several for line in lines(each)):
        for text in (line.title, line.written(line.value), line.change_text):
            assert text in html and text in markdown
    assert "smaller" in html and "smaller" in markdown


def test_what_is_written_is_read_back(single: Path, several: Path) -> None:
    one, both = read_reported(single), read_reported(several)
    assert isinstance(one, Evaluation) and one.measurements == evaluation().measurements
    assert isinstance(both, Comparison) and as_comparison([both, one]).evaluations == (*both.evaluations, one)


def test_reports_against_different_dense_models_are_not_compared() -> None:
    with pytest.raises(CompressError, match="different dense models") as refused:
        as_comparison([evaluation(), evaluation(baseline="other")])
    assert refused.value.exit_code is ExitCode.USAGE


def test_a_report_replaces_a_report_and_nothing_else(tmp_path: Path) -> None:
    found = evaluation(compression=None, measurements=evaluation().measurements[:5])
    write_report(found, tmp_path / "report")
    write_report(found.model_copy(update={"model": "newer"}), tmp_path / "report")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["model"] == "newer"
    (tmp_path / "report" / "notes.txt").write_text("mine")
    with pytest.raises(CompressError, match="not empty"):
        write_report(found, tmp_path / "report")
    assert (tmp_path / "report" / "notes.txt").read_text() == "mine"


def test_the_front_is_what_no_other_model_beats() -> None:
    points = [Point("a", 1, 5), Point("b", 2, 3), Point("c", 3, 3), Point("d", 4, 1), Point("e", 4, 2)]
    assert [p.name for p in pareto(points, larger_x_is_better=False)] == ["a", "b", "d"]
    assert [p.name for p in pareto(points, larger_x_is_better=True)] == ["d"]
