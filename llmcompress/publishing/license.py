"""The license of the dense model, and what it says of publishing what is made from it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmcompress.errors import CompressError
from llmcompress.publishing.base_model import card_in_folder, card_on_hub
from llmcompress.publishing.hub import hub_api, hub_errors

_PERMISSIVE = frozenset({
    "afl-3.0", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc-by-4.0", "cc0-1.0", "isc", "mit",
    "mpl-2.0", "unlicense", "zlib",
})  # fmt: skip
"""Identifiers of the Hub whose terms allow anyone to publish changed copies, with the notice kept."""


@dataclass(frozen=True)
class License:
    """As the model's card states it."""

    name: str | None = None
    """The Hub's identifier, or the name that belongs to `other`; None: no card says it."""
    link: str | None = None

    @property
    def note(self) -> str:
        """What that means for who publishes the result."""
        if self.name is None:
            return "no license was found: ask the author before anything made from it is published"
        identifier = self.name.lower()
        if identifier in _PERMISSIVE:
            return f"{self.name}: the result may be published, with the model's notice"
        where = f" ({self.link})" if self.link else ""
        if "-nc" in identifier:
            return f"{self.name}{where}: the result may be published for non-commercial use only, under these terms"
        if "-nd" in identifier:
            return f"{self.name}{where}: changed copies must not be published"
        return f"{self.name}{where}: terms of its own, which go on with the result; read them before it is published"


def license_of(folder: Path, *, hub_id: str | None) -> License:
    """From the card in the folder, else from that on the Hub; unknown where neither can be read."""
    found = card_in_folder(folder)
    if "license" not in found and hub_id is not None:
        with suppress(CompressError), hub_errors(hub_id, saved="nothing was sent"):
            found = card_on_hub(hub_api(), hub_id)
    return _stated(found)


def _stated(card: Mapping[str, object]) -> License:
    name, link = card.get("license"), card.get("license_link")
    if name == "other":
        name = card.get("license_name") or name
    return License(None if name is None else str(name), None if link is None else str(link))
