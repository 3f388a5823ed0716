"""Two processes that share the calibration windows come to what one process comes to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmcompress import CompressError, compress, load
from llmcompress.calibration.process_group import ProcessGroup
from llmcompress.numerics.sample import InputSample
from llmcompress.numerics.statistics import AbsMax, AbsMean, Gram, Moments, Pool, SquaredNorm, Statistic
from llmcompress.recipe import parse_recipe
from tests.tiny_folder import write_tiny_llama
from tests.warm_python import Done, WarmPython

SETTINGS = """
calibration: {samples: 6, tokens: 48, batch: 2}
evaluate: {perplexity: [{source: 'builtin:evaluation', window: 48, max_windows: 3}]}
"""
FALLS_BACK = "a block that is replaced by its baseline"
RECIPES = {
    "gptq": "passes: [{gptq: {scheme: int4_g16}}]",
    "awq": "passes: [{awq: {scheme: int4_g16_asym}}]",
    "smooth, eight bits": "passes: [{smoothquant: {}}, {gptq: {scheme: int8_channel_a8tensor}}]",
    "zeros, then codes": "passes: [{wanda: {sparsity: 0.5}}, {rtn: {scheme: int8_channel}}]",
    FALLS_BACK: "passes: [{wanda: {sparsity: 0.5}}]",
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PROGRAM = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from llmcompress import CompressError, compress
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe

class Dying(Silent):
    def step(self, text):
        if text == sys.argv[4]:
            os._exit(9)

try:
    recipe = parse_recipe(Path(sys.argv[3]).read_text(), "test")
    report = compress(sys.argv[1], recipe, sys.argv[2], progress=Dying()).report
    Path("ppl" + os.environ["RANK"]).write_text(repr(report.quality[0].compressed.perplexity))
except CompressError as problem:
    print(problem.code, problem)
    sys.exit(3)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return write_tiny_llama(folder, hidden_size=64, intermediate_size=96, num_hidden_layers=3)


def in_two_processes(python: WarmPython, model: Path, text: str, folder: Path, *, dies_at: str = "") -> Done:
    """What both said, and the first exit code that is not 0."""
    (folder / "recipe.yaml").write_text(SETTINGS + text)
    arguments = [model, folder / "out", folder / "recipe.yaml", dies_at]
    both = python.run_ranks(PROGRAM, *arguments, count=2, folder=folder)
    code = next((done.returncode for done in both if done.returncode), 0)
    return Done([], code, both[0].stdout + both[1].stdout, both[0].stderr + both[1].stderr)


def under_torchrun(model: Path, text: str, folder: Path) -> Done:
    (folder / "recipe.yaml").write_text(SETTINGS + text)
    (folder / "program.py").write_text(PROGRAM)
    arguments = [model, folder / "out", folder / "recipe.yaml", ""]
    return subprocess.run(
        [sys.executable, *TORCHRUN, "program.py", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model, _ = load(folder, dtype=torch.float32)
    return model(torch.arange(40)[None]).logits


def assert_alike(found: Path, wanted: Path) -> None:
    """The same tensors; sums in another order may move a code that lay on the border of two."""
    ours, theirs = load_file(found / "model.safetensors"), load_file(wanted / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        same = (tensor == theirs[name]).float().mean()
        assert same > 0.98, name
    torch.testing.assert_close(logits(found), logits(wanted), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_equal_one(name: str, tiny: Path, tmp_path: Path, our_python: WarmPython) -> None:
    report = compress(str(tiny), parse_recipe(SETTINGS + RECIPES[name], "test"), tmp_path / "one").report
    done = in_two_processes(our_python, tiny, RECIPES[name], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = [float((tmp_path / file).read_text()) for file in ("ppl0", "ppl1")]
    assert measured[0] == measured[1]
    assert measured[0] == pytest.approx(report.quality[0].compressed.perplexity, rel=1e-3)
    assert_alike(tmp_path / "out", tmp_path / "one")
    assert not (tmp_path / "out.run").exists()
    if name == FALLS_BACK:
        told = json.loads((tmp_path / "out" / "llmcompress_report.json").read_text())["sites"]
        replaced = [{"site": row.site, "degraded": row.degraded} for row in report.sites if row.degraded]
        assert replaced == [{key: row[key] for key in ("site", "degraded")} for row in told if row.get("degraded")]
        assert any("replaced by magnitude" in str(row["degraded"]) for row in replaced)


def test_two_processes_killed_and_started_again_go_on(tiny: Path, tmp_path: Path, our_python: WarmPython) -> None:
    killed = in_two_processes(our_python, tiny, RECIPES["gptq"], tmp_path, dies_at="block 2/3")
    assert killed.returncode != 0 and (tmp_path / "out.run" / "journal.jsonl").read_text().count("\n") == 2
    done = in_two_processes(our_python, tiny, RECIPES["gptq"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    compress(str(tiny), parse_recipe(SETTINGS + RECIPES["gptq"], "test"), tmp_path / "one")
    assert_alike(tmp_path / "out", tmp_path / "one")


def test_torchrun_starts_such_processes(tiny: Path, tmp_path: Path) -> None:
    recipe = "passes: [{rtn: {scheme: int4_g16}}]"
    done = under_torchrun(tiny, recipe, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "ppl0").read_text() == (tmp_path / "ppl1").read_text()


def test_passes_on_the_whole_model_are_refused(tiny: Path, tmp_path: Path, our_python: WarmPython) -> None:
    done = in_two_processes(our_python, tiny, "passes: [{depth: {count: 1}}]", tmp_path)
    assert done.returncode != 0 and "processes.one-only" in done.stdout


@pytest.mark.parametrize("recipe", ["{gptq: {scheme: int4_g16}}, depth", "outlier_suppression"])
def test_what_cannot_be_shared_is_refused_before_any_work(
    recipe: str, tiny: Path, tmp_path: Path, our_python: WarmPython
) -> None:
    done = in_two_processes(our_python, tiny, f"passes: [{recipe}]", tmp_path)
    assert done.returncode != 0 and "processes.one-only" in done.stdout
    assert not list(tmp_path.glob("out.run/blocks/*"))


def test_rounding_is_learned_by_two_processes_together(tiny: Path, tmp_path: Path, our_python: WarmPython) -> None:
    recipe = "passes: [{learned_rounding: {scheme: int2_g16, steps: 12}}]"
    done = in_two_processes(our_python, tiny, recipe, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "ppl0").read_text() == (tmp_path / "ppl1").read_text()
    rows = json.loads((tmp_path / "out" / "llmcompress_report.json").read_text())["sites"]
    assert len(rows) == 21 and all(row["error"] < row["error_before"] for row in rows)


def test_every_window_belongs_to_one_process() -> None:
    windows = torch.arange(7)[:, None]
    shares = [ProcessGroup(index, 3).shard(windows) for index in range(3)]
    assert sorted(torch.cat(shares).flatten().tolist()) == list(range(7))
    with pytest.raises(CompressError, match="cannot share 2"):
        ProcessGroup(0, 3).shard(windows[:2])


class Other(Pool):
    """A second process, played by the statistics that it would bring."""

    index = 0

    def __init__(self, other: Statistic) -> None:
        self._brought = iter([torch.tensor([other.tokens]), *parts(other)])

    def all_reduce_sum_(self, tensor: torch.Tensor) -> None:
        tensor += next(self._brought)

    def all_reduce_max_(self, tensor: torch.Tensor) -> None:
        torch.maximum(tensor, next(self._brought), out=tensor)


def parts(statistic: Statistic) -> list[torch.Tensor]:
    return [value.clone() for value in vars(statistic).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("kind", [Gram, AbsMax, AbsMean, SquaredNorm])
def test_pooled_statistics_are_those_of_all_tokens(kind: type[Any]) -> None:
    x_TI = torch.randn(50, 8)
    first, second, both = (kind(8, torch.device("cpu")) for _ in range(3))
    first.add(x_TI[:20])
    second.add(x_TI[20:])
    both.add(x_TI)
    first.pool(Other(second))
    assert first.tokens == 50
    for found, wanted in zip(parts(first), parts(both), strict=True):
        torch.testing.assert_close(found, wanted)


def test_pooled_moments_keep_the_variance_of_channels_with_a_large_mean() -> None:
    x_TI = torch.randn(60, 4, dtype=torch.float32) + 100
    first, second = Moments(4, torch.device("cpu")), Moments(4, torch.device("cpu"))
    first.add(x_TI[:20])
    second.add(x_TI[20:] + 5)
    all_TI = torch.cat([x_TI[:20], x_TI[20:] + 5])
    # the second process computes its own share with the mean of all, which is known after the first two sums
    deviation = second._squares_I + 40 * (second.mean_I - all_TI.mean(0)).square()
    brought = iter([torch.tensor([40]), second.mean_I * 40, deviation])

    class Two(Other):
        def __init__(self) -> None:
            self._brought = brought

    first.pool(Two())
    torch.testing.assert_close(first.mean_I, all_TI.mean(0))
    torch.testing.assert_close(first.variance_I, all_TI.var(0, unbiased=False), rtol=1e-3, atol=1e-3)


def test_a_statistic_that_has_no_sum_refuses() -> None:
    assert not InputSample.adds_up and AbsMax.adds_up
    with pytest.raises(TypeError, match="InputSample"):
        InputSample(4, torch.device("cpu")).pool(Other(AbsMax(4, torch.device("cpu"))))
