"""What every test file may cost in CPU seconds, its child processes included; a file that takes more fails the run.

Wall time says how busy a machine is, CPU time hardly does. Each budget is about 2.5 times what was measured, so that
slower processors pass; a file that exceeds it has become another file.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import pytest

from tests.warm_python import WarmPython

DEFAULT_SECONDS = 20
"""For a file that is not listed: new ones should not need to be."""
BUDGET_SECONDS: dict[str, int] = {
    "tests/test_pipeline.py": 260,
    "tests/test_allocate.py": 50,
    "tests/test_cuda.py": 100,
    "tests/passes/test_laws.py": 90,
    "tests/test_process_group.py": 90,
    "tests/exporters/test_fresh_process.py": 80,
    "tests/calibration/test_experts.py": 70,
    "tests/model/test_infer_config.py": 70,
    "tests/passes/pruning/test_width.py": 70,
    "tests/test_quality.py": 80,
    "tests/test_recipe.py": 70,
    "tests/test_public_face.py": 50,
    "tests/modules/test_dynamic.py": 50,
    "tests/test_offload.py": 50,
    "tests/exporters/test_manifest.py": 40,
    "tests/exporters/test_openvino_families.py": 140,
    "tests/exporters/test_onnx_genai.py": 60,
    "tests/exporters/test_aot_inductor.py": 100,
    "tests/exporters/test_onnx_static_families.py": 40,
    "tests/search/optimizers/test_optimizers.py": 70,
    "tests/passes/pruning/test_gates.py": 40,
    "tests/passes/pruning/test_sparse.py": 40,
    "tests/test_composition.py": 40,
    "tests/calibration/test_data.py": 30,
    "tests/search/levels/test_bench.py": 60,
    "tests/search/study/test_search.py": 30,
    "tests/search/study/test_search_files.py": 45,
    "tests/search/study/test_workers.py": 30,
    "tests/cli/test_footprint_and_speed.py": 40,
    "tests/faults/test_commands.py": 45,
    "tests/test_hub_models.py": 30,
    "tests/evaluation/test_protocols.py": 60,
    "tests/test_examples.py": 110,
    "tests/model/test_depth.py": 30,
    "tests/model/test_map.py": 30,
    "tests/model/test_residual.py": 30,
    "tests/modules/test_kv_cache.py": 30,
    "tests/passes/pruning/test_slicegpt.py": 30,
    "tests/passes/quantization/test_bitsandbytes.py": 30,
    "tests/passes/quantization/test_gsq.py": 60,
    "tests/passes/quantization/test_kv_cache.py": 30,
    "tests/passes/quantization/test_low_bit_helpers.py": 30,
    "tests/passes/quantization/test_number_formats.py": 30,
    "tests/passes/quantization/test_rearranged_reload.py": 30,
    "tests/passes/quantization/test_reorder.py": 30,
    "tests/passes/quantization/test_rotation.py": 30,
    "tests/test_readme.py": 30,
}
PROPERTY = "cpu_seconds"


class CpuBudget:
    """Notes in every report what was used since the one before it; adds it up where all reports arrive."""

    def __init__(self, *, enforced: bool) -> None:
        self.enforced = enforced
        self.warm: list[WarmPython] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self._before = self._used()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        """One for set-up, one for the test, one for what follows."""
        report = yield
        now = self._used()
        report.user_properties = [*report.user_properties, (PROPERTY, now - self._before)]
        self._before = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Runs where the session is, also for tests of other workers."""
        self.seconds[report.nodeid.partition("::")[0]] += dict(report.user_properties).get(PROPERTY, 0.0)

    def too_slow(self) -> dict[str, float]:
        """Files over their budget."""
        if not self.enforced:
            return {}
        return {file: used for file, used in self.seconds.items() if used > budget_seconds(file)}

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A run that passed has failed when a file took too long."""
        if self.too_slow() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        """The files that took too long and what to do; all of them with `--cpu`."""
        if config.getoption("cpu"):
            terminalreporter.section("CPU seconds of each file, child processes included")
            for file, used in sorted(self.seconds.items(), key=lambda each: -each[1]):
                terminalreporter.line(f"{used:8.1f} of {budget_seconds(file):4d}  {file}")
            terminalreporter.line(f"{sum(self.seconds.values()):8.1f}          all")
        for file, used in self.too_slow().items():
            terminalreporter.line(
                f"{file} used {used:.0f} CPU seconds, its budget is {budget_seconds(file)}: make it cheaper "
                f"(CONTRIBUTING.md says how), or raise it in tests/cpu_budget.py and say why in the commit",
                red=True,
            )

    def _used(self) -> float:
        """CPU seconds of this process, of its children that ended, and of those that wait for programs."""
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return own + sum(python.cpu_seconds() for python in self.warm)


def budget_seconds(file: str) -> int:
    """What a file may take."""
    return BUDGET_SECONDS.get(file, DEFAULT_SECONDS)
