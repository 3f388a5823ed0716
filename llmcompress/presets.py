"""The recipes that come with the package: `configs/` of a checkout, `llmcompress/configs` of an installed wheel."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from llmcompress.errors import CompressError, ExitCode, did_you_mean

if TYPE_CHECKING:
    from llmcompress.passes.base import Pass
    from llmcompress.recipe import Recipe

RecipeLike: TypeAlias = Union["Recipe", "Pass", Mapping[str, Any], Sequence[Any], str, Path]
"""What `as_recipe` takes."""

_PACKAGE = Path(__file__).parent


def preset_names() -> tuple[str, ...]:
    """`w4`, `w8a8`, ... for any model and, for trying things out in seconds, `tiny/rtn`, ..."""
    folder = configs_folder()
    names = [path.stem for path in sorted((folder / "recipes").glob("*.yaml"))]
    return (*names, *(f"tiny/{path.stem}" for path in sorted((folder / "tiny").glob("*.yaml"))))


def paper_names() -> tuple[str, ...]:
    """`papers/minillm-gpt2-125m`, …: presets that name their models, in the setting of the paper they are from."""
    return tuple(f"papers/{path.stem}" for path in sorted((configs_folder() / "papers").glob("*.yaml")))


def preset_path(name: str) -> Path:
    """The file of a preset.

    Raises: CompressError naming the nearest preset.
    """
    names = (*preset_names(), *paper_names())
    if name not in names:
        raise CompressError(
            "preset.unknown",
            f"unknown preset {name!r}",
            fix=did_you_mean(name, names),
            exit_code=ExitCode.USAGE,
        )
    folder, _, stem = name.rpartition("/")
    return configs_folder() / (folder or "recipes") / f"{stem}.yaml"


def preset_summary(name: str) -> str:
    """The first comment line of a preset."""
    return preset_path(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def load_preset(name: str, *, settings: Sequence[str] = ()) -> Recipe:
    """The recipe of a preset, with settings such as `calibration.samples=16` applied.

    Raises: CompressError for an unknown name or setting.
    """
    from llmcompress.recipe import read_recipe

    return read_recipe(preset_path(name), settings=settings)


def as_recipe(recipe: RecipeLike, *, settings: Sequence[str] = ()) -> Recipe:
    """Whatever says what is to be done → a recipe.

    A `Recipe`; a preset's name; a file; YAML or JSON text; a dictionary as in YAML; one pass; or a list of passes, each
    an object, a name, or `{name: options}`.

    Raises: CompressError when it is none of them, or not a valid recipe.
    """
    from llmcompress.recipe import Recipe, parse_recipe

    if isinstance(recipe, Recipe):
        found = recipe
    elif isinstance(recipe, str | Path):
        return _written(recipe, settings)
    elif isinstance(recipe, Mapping):
        found = Recipe.from_dict(recipe)
    else:
        found = Recipe.from_dict({"passes": recipe if isinstance(recipe, list | tuple) else [recipe]})
    return parse_recipe(found.to_yaml(), "recipe", settings=settings) if settings else found


def _written(recipe: str | Path, settings: Sequence[str]) -> Recipe:
    """A preset's name, a file or a text; a text has a colon and a space or a line's end behind a key."""
    from llmcompress.recipe import parse_recipe, read_recipe

    if isinstance(recipe, str) and (recipe.lstrip().startswith("{") or re.search(r":(\s|$)", recipe)):
        return parse_recipe(recipe, "recipe", settings=settings)
    if isinstance(recipe, Path) or recipe.endswith((".yaml", ".yml", ".json")):
        return read_recipe(recipe, settings=settings)
    return load_preset(recipe, settings=settings)


def configs_folder() -> Path:
    """The wheel's copy where there is one, otherwise the checkout's."""
    inside, beside = _PACKAGE / "configs", _PACKAGE.parent / "configs"
    return inside if inside.is_dir() else beside
