"""What a model card says of the dense model: its id, and the licence that goes on with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmcompress.publishing.hub import asked
from llmcompress.records.report import Report
from llmcompress.storage.names import CARD
from llmcompress.storage.paths import from_home

if TYPE_CHECKING:
    from huggingface_hub import HfApi

INHERITED = ("license", "license_name", "license_link", "language")
"""Keys of its card that hold for what is made from it."""


@dataclass(frozen=True)
class BaseModel:
    """The dense model, as a reader of the card can find it."""

    name: str
    """Its id on the Hub; otherwise its last name, never a path."""
    id: str | None = None
    """None: it was read from a folder, and nothing says which model it is."""
    commit: str | None = None
    inherited: Mapping[str, Any] = field(default_factory=dict)
    """Of its own card."""


def base_model(report: Report | None, *, stated: str | None, api: HfApi) -> BaseModel:
    """By its id, as stated or as it was downloaded; the licence from its card, on the Hub or in its folder.

    Raises: errors of huggingface_hub where the Hub cannot be asked; a model that is not there says nothing.
    """
    if report is None:
        return BaseModel(stated or "an unknown model", stated)
    name, commit = report.model.partition("@")[0], report.base.get("commit")
    found = stated or (name if commit else None)
    folder = from_home(report.model)
    if found is None:
        last = name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].removeprefix("builtin:")
        return BaseModel(last, inherited=card_in_folder(folder))
    return BaseModel(found, found, commit, card_on_hub(api, found) or card_in_folder(folder))


def card_on_hub(api: HfApi, name: str) -> dict[str, Any]:
    """What goes on of the model's card there; empty where there is none.

    Raises: errors of huggingface_hub.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        card = asked(lambda: api.model_info(name)).card_data
    except RepositoryNotFoundError:
        return {}
    return {} if card is None else _chosen(card.to_dict())  # type: ignore[no-untyped-call]


def card_in_folder(folder: Path) -> dict[str, Any]:
    """The front matter of its README.md; a licence file without one is told of as such."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        found = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        found = {}
    chosen = _chosen(found if isinstance(found, dict) else {})
    if "license" not in chosen and folder.is_dir() and any(folder.glob("LICENSE*")):
        chosen |= {"license": "other", "license_link": next(folder.glob("LICENSE*")).name}
    return chosen


def _chosen(card: Mapping[str, Any]) -> dict[str, Any]:
    return {key: card[key] for key in INHERITED if card.get(key)}
