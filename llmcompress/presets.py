"""The recipes that come with the package: `configs/` of a checkout, `llmcompress/configs` of an installed wheel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmcompress.errors import CompressError, ExitCode, did_you_mean

if TYPE_CHECKING:
    from llmcompress.recipe import Recipe

_PACKAGE = Path(__file__).parent


def preset_names() -> tuple[str, ...]:
    """`w4`, `w8a8`, ... and, for trying things out in seconds, `tiny/rtn`, ..."""
    folder = _configs()
    names = [path.stem for path in sorted((folder / "recipes").glob("*.yaml"))]
    return (*names, *(f"tiny/{path.stem}" for path in sorted((folder / "tiny").glob("*.yaml"))))


def preset_path(name: str) -> Path:
    """The file of a preset.

    Raises: CompressError naming the nearest preset.
    """
    names = preset_names()
    if name not in names:
        raise CompressError(
            "preset.unknown",
            f"unknown preset {name!r}",
            fix=did_you_mean(name, names),
            exit_code=ExitCode.USAGE,
        )
    folder, _, stem = name.rpartition("/")
    return _configs() / (folder or "recipes") / f"{stem}.yaml"


def preset_summary(name: str) -> str:
    """The first comment line of a preset."""
    return preset_path(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def load_preset(name: str, *, settings: Sequence[str] = ()) -> Recipe:
    """The recipe of a preset, with `--set` texts applied.

    Raises: CompressError for an unknown name or setting.
    """
    from llmcompress.recipe import read_recipe

    return read_recipe(preset_path(name), settings=settings)


def as_recipe(recipe: Recipe | str | Path, *, settings: Sequence[str] = ()) -> Recipe:
    """A recipe, the name of a preset, or a recipe file → a recipe.

    Raises: CompressError when it is none of them.
    """
    from llmcompress.recipe import Recipe, parse_recipe, read_recipe

    if isinstance(recipe, Recipe):
        return parse_recipe(recipe.to_yaml(), "recipe", settings=settings) if settings else recipe
    is_file = isinstance(recipe, Path) or recipe.endswith((".yaml", ".yml"))
    return read_recipe(recipe, settings=settings) if is_file else load_preset(str(recipe), settings=settings)


def _configs() -> Path:
    """The wheel's copy where there is one, otherwise the checkout's."""
    inside, beside = _PACKAGE / "configs", _PACKAGE.parent / "configs"
    return inside if inside.is_dir() else beside
