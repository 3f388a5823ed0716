"""Energy comes from a counter, minus idle, or there is a reason and no number."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmcompress.evaluation.device.energy import Watch, measure_energy
from llmcompress.evaluation.device.instruments import (
    BatteryCounter,
    NvmlCounter,
    RaplCounter,
    Unreadable,
    find_instrument,
)
from tests.evaluation.device.clockwork import Clockwork

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Meter:
    """A machine of 10 W at rest, that takes 40 W more in a prefill and 20 W more in a step."""

    name, least_seconds = "a meter", 8.0

    def __init__(self, runner: Clockwork, *, drift: float = 0.0) -> None:
        self.runner, self.drift = runner, drift
        self.counted = 0.0
        self.slept = 0
        self.seen = 0

    def joules(self) -> float:
        for _, tokens in self.runner.log[self.seen :]:
            self.counted += 50 * self.runner.prefill if tokens > 1 else 30 * self.runner.step
        self.seen = len(self.runner.log)
        return self.counted

    def sleep(self, seconds: float) -> None:
        self.runner.now += seconds
        self.counted += (10 + self.drift * self.slept) * seconds
        self.slept += 1


def energy_of(drift: float = 0.0):
    runner = Clockwork(prefill=2.0, step=0.5)
    meter = Meter(runner, drift=drift)
    watch = Watch(meter, clock=runner.clock, sleep=meter.sleep)
    return measure_energy(watch, runner, torch.zeros(3, 6), new_tokens=5)


def test_idle_power_is_subtracted_and_prefill_and_decode_are_told_apart() -> None:
    found = energy_of()
    assert found.prefill_joules_per_token == pytest.approx(40 * 2.0 / (3 * 6))
    assert found.decode_joules_per_token == pytest.approx(20 * 4 * 0.5 / (3 * 4))
    assert found.idle_watts == (10.0, 10.0) and found.instrument == "a meter" and found.unavailable is None
    assert found.busy_watts == pytest.approx((50 * 2.0 + 30 * 2.0) / 4.0)


def test_an_idle_power_that_drifts_by_more_than_the_model_adds_gives_a_reason_and_no_number() -> None:
    assert energy_of(drift=1.0).decode_joules_per_token is not None
    found = energy_of(drift=60.0)
    assert found.decode_joules_per_token is None and "something else uses the machine" in (found.unavailable or "")


def test_a_counter_that_stops_gives_a_reason() -> None:
    runner = Clockwork()

    class Broken(Meter):
        def joules(self) -> float:
            raise Unreadable("the charger was plugged in")

    meter = Broken(runner)
    found = measure_energy(Watch(meter, runner.clock, meter.sleep), runner, torch.zeros(1, 2), new_tokens=2)
    assert (found.instrument, found.unavailable) == (None, "the charger was plugged in")


def sysfs_file(path: Path, text: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")
    return path


def rapl_zone(root: Path, zone: str, name: str, microjoules: int, *, limit: int = 1_000_000) -> Path:
    folder = root / "powercap" / zone
    sysfs_file(folder / "name", name)
    sysfs_file(folder / "max_energy_range_uj", limit)
    return sysfs_file(folder / "energy_uj", microjoules)


def test_rapl_adds_packages_and_their_memory_but_neither_cores_nor_the_same_package_twice(tmp_path: Path) -> None:
    package = rapl_zone(tmp_path, "intel-rapl:0", "package-0", 100)
    cores = rapl_zone(tmp_path, "intel-rapl:0:0", "core", 50)
    memory = rapl_zone(tmp_path, "intel-rapl:0:1", "dram", 10)
    second = rapl_zone(tmp_path, "intel-rapl:1", "package-1", 7)
    twin = rapl_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5)
    platform = rapl_zone(tmp_path, "intel-rapl:2", "psys", 5)
    counter = find_instrument(CPU, sysfs=tmp_path)
    assert counter.name == "RAPL, package-0 + package-1 + dram" and counter.joules() == 0.0
    for file, now in ((package, 1100), (memory, 210), (second, 37), (cores, 999), (twin, 999), (platform, 999)):
        sysfs_file(file, now)
    assert counter.joules() == pytest.approx((1000 + 200 + 30) / 1e6)


def test_a_rapl_counter_that_starts_again_goes_on_growing(tmp_path: Path) -> None:
    file = rapl_zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    counter = RaplCounter.open(tmp_path)
    readings = []
    for now in (990_000, 40_000, 50_000, 10_000):
        sysfs_file(file, now)
        readings.append(counter.joules())
    assert readings == pytest.approx([0.09, 0.14, 0.15, 1.11])


def test_a_battery_counts_what_it_gives_in_watt_hours_or_in_ampere_hours(tmp_path: Path) -> None:
    folder = tmp_path / "power_supply" / "BAT0"
    sysfs_file(tmp_path / "power_supply" / "AC" / "type", "Mains")
    sysfs_file(folder / "type", "Battery")
    status = sysfs_file(folder / "status", "Discharging")
    energy = sysfs_file(folder / "energy_now", 5_000_000)
    counter = find_instrument(CPU, sysfs=tmp_path)
    assert counter.name == "battery BAT0, the whole computer"
    sysfs_file(energy, 4_900_000)
    assert counter.joules() == pytest.approx(0.1 * 3600)
    energy.unlink()
    sysfs_file(folder / "voltage_now", 12_000_000)
    charge = sysfs_file(folder / "charge_now", 2_000_000)
    counter = BatteryCounter.open(tmp_path)
    sysfs_file(charge, 1_990_000)
    assert counter.joules() == pytest.approx(0.01 * 12 * 3600)
    sysfs_file(status, "Charging")
    with pytest.raises(Unreadable, match=r"BAT0 is not in use \(status: Charging\)"):
        counter.joules()


def test_a_counter_for_root_alone_is_told_with_its_file(tmp_path: Path) -> None:
    file = rapl_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    file.unlink()
    file.mkdir()  # fails to be read for root too
    with pytest.raises(Unreadable) as told:
        find_instrument(CPU, sysfs=tmp_path)
    assert f"RAPL: {file}: Is a directory" in str(told.value) and "battery: " in str(told.value)


def test_without_any_counter_every_one_that_was_tried_is_told(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match=r"RAPL: .*powercap lists no processor package; battery: .* lists none"):
        find_instrument(CPU, sysfs=tmp_path)
    with pytest.raises(Unreadable, match="no counter for mps"):
        find_instrument(torch.device("mps"), sysfs=tmp_path)


class NvmlError(Exception):
    pass


def fake_nvml(**changes: Any) -> Any:
    """What we use of the module; GPU-abc is at 5 J."""

    def handle(uuid: str) -> str:
        assert uuid == "GPU-abc"
        return "handle"

    found = {
        "NVMLError": NvmlError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": handle,
        "nvmlDeviceGetTotalEnergyConsumption": {"handle": 5000}.__getitem__,
    }
    return SimpleNamespace(**{**found, **changes})


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")


@pytest.mark.usefixtures("one_gpu")
def test_nvml_reads_the_board_that_torch_means_in_joules() -> None:
    counter = find_instrument(GPU, nvml=fake_nvml())
    assert (counter.name, counter.joules()) == ("NVML, A GPU alone", 5.0)


@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_without_that_counter_is_told_in_the_drivers_words() -> None:
    def refuse(handle: object) -> int:
        raise NvmlError("Not Supported")

    with pytest.raises(Unreadable, match="NVML: Not Supported"):
        NvmlCounter.open(GPU, fake_nvml(nvmlDeviceGetTotalEnergyConsumption=refuse))
