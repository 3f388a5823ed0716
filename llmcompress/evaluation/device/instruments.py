"""Counters of energy: of NVIDIA GPUs (NVML), of processors (RAPL), of a battery. Each says what it covers.

Where none can be read there is a reason, never an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

SYSFS = Path("/sys/class")

_JOULES_PER_MICROWATT_HOUR = 3.6e-3


class Instrument(Protocol):
    """A counter of energy that only grows."""

    name: str
    """Which counter, and what it covers."""
    least_seconds: float
    """For how long a reading must last, so that the counter's own steps do not matter."""

    def joules(self) -> float:
        """Since it was opened.

        Raises: Unreadable when it stops working.
        """


class Unreadable(Exception):
    """No counter can be read; the message is the reason that the record tells."""


def find_instrument(device: torch.device, *, sysfs: Path = SYSFS, nvml: Any = None) -> Instrument:
    """The counter that covers this device: NVML for a GPU; RAPL, or else a battery, for the processor.

    `sysfs` stands for `/sys/class`, `nvml` for the module `pynvml`.

    Raises: Unreadable with every counter that was tried and why it could not be read.
    """
    if device.type == "cuda":
        return NvmlCounter.open(device, nvml)
    if device.type != "cpu":
        raise Unreadable(f"no counter for {device.type} is supported")
    reasons = []
    for kind in (RaplCounter, BatteryCounter):
        try:
            return kind.open(sysfs)
        except Unreadable as problem:
            reasons.append(str(problem))
    raise Unreadable("; ".join(reasons))


@dataclass
class NvmlCounter:
    """Energy of one GPU board since its driver was loaded, in steps of some 20 to 100 ms."""

    name: str
    least_seconds: float = field(default=5.0, init=False)
    nvml: Any
    handle: Any

    @classmethod
    def open(cls, device: torch.device, nvml: Any = None) -> NvmlCounter:
        """The board that torch calls by this device; found by its UUID, since CUDA_VISIBLE_DEVICES renumbers.

        Raises: Unreadable.
        """
        if torch.version.hip and nvml is None:
            raise Unreadable("NVML is of NVIDIA GPUs; no counter of AMD GPUs is supported")
        nvml = _nvml() if nvml is None else nvml
        try:
            nvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
            found = cls(f"NVML, {torch.cuda.get_device_name(device)} alone", nvml, handle)
            found.joules()
        except nvml.NVMLError as problem:
            raise Unreadable(f"NVML: {problem}") from problem
        return found

    def joules(self) -> float:
        """The counter is in millijoules."""
        try:
            return float(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1e3
        except self.nvml.NVMLError as problem:
            raise Unreadable(f"NVML: {problem}") from problem


@dataclass
class RaplCounter:
    """Energy of the processor's packages and, where it is counted apart, of memory; in steps of about 1 ms.

    Source: Linux, Documentation/power/powercap/powercap.rst. A counter starts again at 0 after `max_energy_range_uj`,
    minutes apart at full power: it is read more often than that.
    """

    name: str
    least_seconds: float = field(default=2.0, init=False)
    zones: Sequence[Path]
    _last: dict[Path, int] = field(default_factory=dict, init=False)
    _microjoules: int = field(default=0, init=False)

    @classmethod
    def open(cls, sysfs: Path = SYSFS) -> RaplCounter:
        """All packages, with the memory below them.

        Raises: Unreadable.
        """
        root = sysfs / "powercap"
        packages = [zone for zone in sorted(root.glob("intel-rapl:*")) if _named(zone).startswith("package")]
        if not packages:
            raise Unreadable(f"RAPL: {root} lists no processor package")
        parts = [part for zone in packages for part in sorted(root.glob(f"{zone.name}:*")) if _named(part) == "dram"]
        zones = [*packages, *(part for part in parts if part not in packages)]
        found = cls(f"RAPL, {' + '.join(_named(zone) for zone in zones)}", zones)
        found.joules()
        return found

    def joules(self) -> float:
        """What every zone counted since it was last read, added up."""
        for zone in self.zones:
            now = int(_read(zone / "energy_uj", "RAPL"))
            last = self._last.get(zone, now)
            again = int(_read(zone / "max_energy_range_uj", "RAPL")) if now < last else 0
            self._microjoules += now - last + again
            self._last[zone] = now
        return self._microjoules / 1e6


@dataclass
class BatteryCounter:
    """What a battery gave to the whole computer, its screen included; in steps of seconds to a minute."""

    name: str
    least_seconds: float = field(default=120.0, init=False)
    folder: Path
    _last: float | None = field(default=None, init=False)
    _joules: float = field(default=0.0, init=False)

    @classmethod
    def open(cls, sysfs: Path = SYSFS) -> BatteryCounter:
        """The first battery, while it is in use.

        Raises: Unreadable.
        """
        root = sysfs / "power_supply"
        supplies = [each for each in sorted(root.glob("*")) if (each / "type").is_file()]
        batteries = [each for each in supplies if _read(each / "type", "battery").strip() == "Battery"]
        if not batteries:
            raise Unreadable(f"battery: {root} lists none")
        found = cls(f"battery {batteries[0].name}, the whole computer", batteries[0])
        found.joules()
        return found

    def joules(self) -> float:
        """Added up from how much is left."""
        status = _read(self.folder / "status", "battery").strip()
        if status != "Discharging":
            raise Unreadable(f"battery: {self.folder.name} is not in use (status: {status}); unplug the charger")
        left = self._joules_left()
        self._joules += 0.0 if self._last is None else self._last - left
        self._last = left
        return self._joules

    def _joules_left(self) -> float:
        """In µWh, or in µAh with the voltage in µV."""
        if (self.folder / "energy_now").is_file():
            return float(_read(self.folder / "energy_now", "battery")) * _JOULES_PER_MICROWATT_HOUR
        volts = float(_read(self.folder / "voltage_now", "battery")) / 1e6
        return float(_read(self.folder / "charge_now", "battery")) * volts * _JOULES_PER_MICROWATT_HOUR


def _nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        raise Unreadable("NVML: install its package with `pip install llmcompress[energy]`") from None
    return pynvml


def _named(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""


def _read(file: Path, counter: str) -> str:
    try:
        return file.read_text()
    except OSError as problem:
        raise Unreadable(f"{counter}: {file}: {problem.strerror}") from problem
