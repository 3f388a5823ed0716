"""Nothing that llmcompress did not write is ever removed, whatever output is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llmcompress import CompressError, compress
from llmcompress.recipe import Recipe, parse_recipe
from llmcompress.storage.folder import check_output, publish, staging_folder
from llmcompress.storage.ownership import mark_output
from tests.tiny_folder import write_tiny_llama


def _recipe() -> Recipe:
    return parse_recipe("passes: [{rtn: {scheme: int8_channel}}]\nevaluate: {perplexity: []}", "test")


def _refused(output: Path, **options: object) -> CompressError:
    with pytest.raises(CompressError) as caught:
        check_output(output, overwrite=True, **options)
    return caught.value


def _all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that we wrote, and may therefore replace."""
    folder = tmp_path_factory.mktemp("made")
    write_tiny_llama(folder / "dense")
    compress(str(folder / "dense"), _recipe(), folder / "ours")
    return folder / "ours"


@pytest.fixture
def ours(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "parent" / "ours"))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["the model", "its parent", "inside it", "a link to it"])
def test_an_output_that_is_or_holds_or_lies_in_the_model_is_refused(
    where: str, overwrite: bool, ours: Path, tmp_path: Path
) -> None:
    mark_output(ours.parent, [path.relative_to(ours.parent).as_posix() for path in ours.rglob("*")])
    (tmp_path / "link").symlink_to(ours.parent, target_is_directory=True)
    places = {
        "the model": ours,
        "its parent": ours.parent,
        "inside it": ours / "new",
        "a link to it": tmp_path / "link",
    }
    output = places[where] if where != "a link to it" else places[where] / "ours"
    before = _all_files(tmp_path)
    with pytest.raises(CompressError) as caught:
        compress(str(ours), _recipe(), output, overwrite=overwrite)
    assert caught.value.code == "output.is-source" and _all_files(tmp_path) == before


def test_an_output_that_holds_the_files_a_model_links_to_is_refused(ours: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in ours.iterdir():
        (model / file.name).symlink_to(file)
    assert _refused(ours, source=model).code == "output.is-source"


def test_a_model_whose_name_is_that_of_the_run_folder_is_refused(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "exp.run")
    before = _all_files(tmp_path)
    with pytest.raises(CompressError) as caught:
        compress(str(model), _recipe(), tmp_path / "exp")
    assert caught.value.code == "run.not-ours" and _all_files(tmp_path) == before


def test_folders_of_the_user_that_are_called_like_ours_stay(tmp_path: Path) -> None:
    mine = [tmp_path / name for name in (".exp.tmp-12345678", ".exp.tmp-notes", ".exp.old-12345678", "exp.run")]
    for folder in mine:
        (folder / "work").mkdir(parents=True)
        (folder / "work" / "thesis.txt").write_text("mine")
    before = _all_files(tmp_path)
    assert _refused(tmp_path / "exp").code == "run.not-ours"
    shutil.rmtree(mine.pop())
    check_output(tmp_path / "exp", overwrite=True)
    assert all((folder / "work" / "thesis.txt").is_file() for folder in mine)
    assert len(before) == 4 and not (tmp_path / "exp").exists()


def test_files_of_the_user_in_our_run_folder_stay_when_it_goes(tmp_path: Path) -> None:
    model, output = write_tiny_llama(tmp_path / "m"), tmp_path / "exp"

    class Noting:
        def __getattr__(self, name: str):  # every event of a progress
            def note(*_: object, **__: object) -> None:
                if (tmp_path / "exp.run").is_dir():
                    (tmp_path / "exp.run" / "notes.txt").write_text("mine")

            return note

    compress(str(model), _recipe(), output, progress=Noting())
    assert _all_files(tmp_path / "exp.run") == {"notes.txt": b"mine"}


def test_a_dense_model_of_the_user_is_not_overwritten(tmp_path: Path) -> None:
    error = _refused(write_tiny_llama(tmp_path / "fine-tuned"))
    assert error.code == "output.unsafe" and "not written by llmcompress" in error.what


def test_files_of_the_user_in_an_output_are_named_and_stay(ours: Path) -> None:
    check_output(ours, overwrite=True)
    (ours / "deeper").mkdir()
    for name in ("notes.md", "deeper/results.csv"):
        (ours / name).write_text("mine")
    error = _refused(ours)
    assert error.code == "output.other-files" and "deeper/results.csv, notes.md" in error.what
    assert "config.json" not in error.what
    with pytest.raises(CompressError, match=r"notes\.md"), staging_folder(ours) as staging:
        publish(staging, ours, overwrite=True)
    assert (ours / "notes.md").is_file() and (ours / "config.json").is_file()


def test_an_output_that_is_a_link_is_refused_before_any_work(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(ours)
    error = _refused(tmp_path / "link")
    assert error.code == "output.is-link" and str(ours) in error.fix
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert _refused(tmp_path / "dangling").code == "output.is-link"


@pytest.mark.parametrize("length", [250, 300])
def test_a_name_too_long_for_what_lies_beside_it_is_refused_before_any_work(length: int, tmp_path: Path) -> None:
    assert _refused(tmp_path / ("x" * length)).code == "output.name"


def test_an_output_may_be_called_like_a_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_output(Path("org/name"), overwrite=False, source=Path("org/name"))
