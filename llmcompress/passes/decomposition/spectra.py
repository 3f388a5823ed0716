"""The spectrum of every selected site of the dense model, kept until ranks are found. O = outputs, K = directions.

A basis in float32 is as large as the weight: with a run folder it waits there, and one block's are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.calibration.whole import WholeModel
from llmcompress.model.site import LinearSite
from llmcompress.numerics.low_rank import Spectrum, break_even, truncate


@dataclass(frozen=True)
class DenseSite:
    """A dense weight and its spectrum, on the CPU."""

    weight_OI: Tensor
    """In the dtype of the checkpoint where that loses nothing."""
    spectrum: Spectrum
    """Its basis in float32."""

    @classmethod
    def of(cls, site: LinearSite, spectrum: Spectrum) -> DenseSite:
        """A site as it is now."""
        weight_OI = site.weight_OI
        stored_OI = weight_OI.to(site.storage_dtype)
        smallest_OI = stored_OI if torch.equal(stored_OI.float(), weight_OI) else weight_OI
        return cls(smallest_OI.cpu(), Spectrum(spectrum.basis_OK.float().cpu(), spectrum.energy_K.cpu()))

    def of_rank(self, rank: int, device: torch.device) -> Tensor:
        """The best weight of that rank; the weight itself where factors would not be smaller."""
        if rank >= break_even(*self.weight_OI.shape):
            return self.weight_OI.float()
        spectrum = Spectrum(self.spectrum.basis_OK.to(device).double(), self.spectrum.energy_K)
        return truncate(self.weight_OI.to(device).float(), spectrum, rank).product()


class SpectrumStore:
    """Sites of the model's current state by block; in the run folder, where an interrupted run finds them again."""

    def __init__(self, whole: WholeModel) -> None:
        self._keep, self._state = whole.context.keep, whole.context.state
        self._names: dict[int, tuple[str, ...]] = {}
        self._in_memory: dict[int, Mapping[str, DenseSite]] = {}

    def has(self, block: int, names: Sequence[str]) -> bool:
        """Whether an earlier run has kept these sites of a block; then they belong to the store."""
        if self._keep is None or self._state is None or self._keep.measurement(self._key(block)) is None:
            return False
        self._names[block] = tuple(names)
        return True

    def add(self, block: int, sites: Mapping[str, DenseSite]) -> None:
        """Keep the sites of one block.

        Raises: CompressError when the disk is full.
        """
        self._names[block] = tuple(sites)
        if self._keep is None or self._state is None:
            self._in_memory[block] = sites
            return
        tensors: dict[str, Tensor] = {}
        for name, site in sites.items():
            kept = (site.weight_OI, site.spectrum.basis_OK, site.spectrum.energy_K)
            tensors |= {f"{name}.{part}": tensor for part, tensor in zip(_PARTS, kept, strict=True)}
        self._keep.save_measurement(self._key(block), tensors, {})

    def __iter__(self) -> Iterator[tuple[str, DenseSite]]:
        """All sites by full name, in model order; those in the run folder are mapped, block by block."""
        for block in self._names:
            yield from self._block(block).items()

    def _block(self, block: int) -> Mapping[str, DenseSite]:
        if block in self._in_memory:
            return self._in_memory[block]
        found = self._keep.measurement(self._key(block)) if self._keep else None
        assert found is not None, "a run keeps its measurements"
        parts = {name: [found[0][f"{name}.{part}"] for part in _PARTS] for name in self._names[block]}
        return {name: DenseSite(weight, Spectrum(basis, energy)) for name, (weight, basis, energy) in parts.items()}

    def _key(self, block: int) -> str:
        return f"{self._state}-spectra-{block:03d}"


_PARTS = ("weight", "basis", "energy")
