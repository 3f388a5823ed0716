"""What a store holds of one block: its bodies, the levels of its linears in each, and estimated losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmcompress.modules.manifest import Manifest
from llmcompress.plan_search.levels.difference import Difference
from llmcompress.plan_search.levels.encoding import decode, encode
from llmcompress.plan_search.levels.folder import LevelFolder, StoredFile

_BETWEEN = "|"
"""Between the parts of a tensor's name in the file."""


@dataclass
class BlockLevels:
    """One block, as it is built."""

    bodies: dict[str, Difference] = field(default_factory=dict)
    """Against the dense block."""
    sizes: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    """Body → site → outputs and inputs."""
    sites: dict[str, dict[str, dict[str, Difference]]] = field(default_factory=dict)
    """Body → site → option → against the linear of that body; nothing where the option leaves it as it is."""
    same: dict[str, list[str]] = field(default_factory=dict)
    """Body → sites whose levels are those of the first body."""
    losses: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Body → site → option → estimated loss, in nats per token."""
    body_losses: dict[str, float] = field(default_factory=dict)
    """Body → estimated loss with dense linears; `dropped` among them."""

    def save(self, store: LevelFolder, key: str, storage: torch.dtype) -> None:
        """Keep it under that key."""
        tensors: dict[str, Tensor] = {}
        forms: dict[str, Any] = {}

        def put(difference: Difference, *path: str) -> dict[str, Any]:
            for name, tensor in difference.tensors.items():
                full = _BETWEEN.join((*path, name))
                encoded = encode(tensor, storage)
                forms[full] = encoded.form
                tensors.update({full + suffix: part for suffix, part in encoded.parts.items()})
            return {"manifest": difference.manifest.to_json(), "tensors": list(difference.tensors)}

        about = {
            "bodies": {body: put(each, body) for body, each in self.bodies.items()},
            "sizes": self.sizes,
            "sites": {
                body: {
                    site: {option: put(each, body, site, option) for option, each in options.items()}
                    for site, options in sites.items()
                }
                for body, sites in self.sites.items()
            },
            "same": self.same,
            "losses": self.losses,
            "body_losses": self.body_losses,
        }
        store.save(key, tensors, {**about, "forms": forms})


class StoredBlock:
    """One finished block of a store; tensors are read when they are asked for."""

    def __init__(self, file: StoredFile) -> None:
        self._file, self._about = file, file.about

    def body(self, body: str) -> Difference:
        """What makes the dense block narrower."""
        return self._difference(self._about["bodies"][body], body)

    def level(self, body: str, site: str, option: str) -> Difference:
        """What an option makes of the linear that the body has there; for `Difference.module`."""
        found = self._about["sites"][body].get(site, {}).get(option)
        return Difference() if found is None else self._difference(found, body, site, option)

    def owner(self, body: str, site: str) -> str:
        """The body under which the levels of this site are stored: inputs before what a body changes are the same."""
        return next(iter(self._about["bodies"])) if site in self._about["same"].get(body, ()) else body

    def sizes(self, body: str) -> dict[str, tuple[int, int]]:
        """Site → outputs and inputs."""
        return {site: (int(o), int(i)) for site, (o, i) in self._about["sizes"][body].items()}

    def losses(self, body: str) -> Mapping[str, Mapping[str, float]]:
        """Site → option → estimated loss, in nats per token."""
        found: Mapping[str, Mapping[str, float]] = self._about["losses"][body]
        return found

    @property
    def body_losses(self) -> Mapping[str, float]:
        """Body → estimated loss with dense linears; that of leaving the block out under `dropped`."""
        found: Mapping[str, float] = self._about["body_losses"]
        return found

    def _part(self, name: str, suffix: str) -> Tensor:
        return self._file.tensor(name + suffix)

    def _difference(self, stored: Mapping[str, Any], *path: str) -> Difference:
        full = {name: _BETWEEN.join((*path, name)) for name in stored["tensors"]}
        tensors = {name: decode(partial(self._part, own), self._about["forms"][own]) for name, own in full.items()}
        return Difference(Manifest.from_json(stored["manifest"]), tensors)
