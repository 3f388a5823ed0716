"""The registry: names → classes, found by scanning a folder."""

import sys
from pathlib import Path

import pytest

from llmcompress.errors import CompressError, ExitCode
from llmcompress.registry import Registry


@pytest.fixture
def animals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    package = tmp_path / "animals_package"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from llmcompress.registry import Registry\nANIMALS = Registry('animal', 'animals_package')\n"
    )
    (package / "cat.py").write_text("from animals_package import ANIMALS\n@ANIMALS.register('cat')\nclass Cat: ...\n")
    (package / "deep" / "__init__.py").write_text("")
    (package / "deep" / "whale.py").write_text(
        "from animals_package import ANIMALS\n@ANIMALS.register('whale')\nclass Whale: ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from animals_package import ANIMALS  # type: ignore[import-not-found]

    yield ANIMALS
    for name in [name for name in sys.modules if name.startswith("animals_package")]:
        del sys.modules[name]


def test_a_new_file_is_a_new_entry_also_in_a_folder_below(animals):
    assert list(animals) == ["cat", "whale"]
    assert animals["whale"].__name__ == "Whale"


def test_nothing_is_imported_before_the_first_look_up(animals):
    assert "animals_package.cat" not in sys.modules
    assert animals.name_of(animals["cat"]) == "cat"
    assert "animals_package.cat" in sys.modules


@pytest.mark.parametrize(("name", "hint"), [("wale", "did you mean `whale`?"), ("zzz", "use one of cat, whale")])
def test_an_unknown_name_is_a_usage_error_with_the_nearest_name(animals, name, hint):
    with pytest.raises(CompressError, match="unknown animal") as caught:
        animals[name]
    assert caught.value.exit_code is ExitCode.USAGE
    assert caught.value.fix == hint


def test_two_classes_cannot_share_a_name(animals):
    with pytest.raises(AssertionError, match="two animals are called 'cat'"):
        animals.register("cat")(str)
        animals.register("cat")(int)
