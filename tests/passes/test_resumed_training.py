"""Every pass that trains, killed in the middle of a training, ends with the bits of a run that was never killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.calibration.context import RunContext
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES, Pass
from llmcompress.progress import Silent
from llmcompress.run import Run
from tests.families import tiny_model, tiny_tokens

TRAINING = {"steps": 8, "batch": 2, "learning_rate": 1e-2, "save_every": 2}
SPARSE = ("random", {"sparsity": 0.5})


class Killed(Exception):
    pass


class Watching(Silent):
    """Remembers every step, and dies at one of them."""

    def __init__(self, die: str | None = None) -> None:
        self.steps: list[str] = []
        self._die = die

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        if ": step " not in text:
            return
        self.steps.append(text.partition(", loss")[0])
        if self._die and self.steps[-1].endswith(self._die):
            raise Killed


def compressed(folder: Path | None, passes: list[Pass], progress: Watching) -> dict[str, Tensor]:
    model = tiny_model("llama")
    ids = tiny_tokens("llama", batch=6)
    if folder is None:
        done = apply_passes(model, map_model(model), passes, RunContext(ids, batch=4, progress=progress))
    else:
        with Run.open(folder / "out", fingerprint={}, lock_text="", fresh=False) as run:
            context = RunContext(ids, batch=4, progress=progress, keep=run)
            done = apply_passes(model, map_model(model), passes, context)
    return done.model.state_dict()


@pytest.mark.parametrize(
    ("passes", "die"),
    [
        ([SPARSE, ("recover", {})], "recover: step 5/8"),
        ([SPARSE, ("recover", {"rank": 4})], "recover: step 5/8"),
        ([SPARSE, ("rigl", {"every": 2})], "rigl: step 7/8"),
        ([("lottery_ticket", {"rounds": 2, "rewind_step": 2})], "round 2 of 2: step 7/8"),
        ([("lottery_ticket", {"rounds": 2, "early_bird": True, "early_bird_every": 1, "early_bird_distance": 0.5})],
         "round 2 of 2: step 5/8"),
        ([("gates", {"kind": "hard_concrete"})], "(hard_concrete): step 5/8"),
        ([("gates", {"kind": "dsa", "allocation": "global"})], "(dsa): step 5/8"),
        ([("gates", {"kind": "decorator"})], "cycle 3 of 4: step 2/2"),
        ([("progressive_low_rank", {"cuts": 2})], "cut 2 of 2: step 3/4"),
        ([("rtn", {"scheme": "int3_g32"}), ("qat", {"start": "codes", "objective": {"cross_entropy": {}}})],
         "qat: step 5/8"),
        ([("svd", {"fraction": 0.5}), ("recover", {"train": "factors_in_turn"})], "right factors: step 5/8"),
        ([("rotation", {"learned": {**TRAINING, "learning_rate": 0.05}})], "rotation: step 5/8"),
    ],
    ids=[
        "recover", "adapters", "rigl", "lottery", "early-bird", "gates", "dsa", "decorator", "low-rank", "qat",
        "in-turn", "rotation",
    ],
)  # fmt: skip
def test_killed_and_resumed_equals_uninterrupted(passes: list[tuple[str, Any]], die: str, tmp_path: Path) -> None:
    trains = {"recover", "rigl", "lottery_ticket", "gates", "progressive_low_rank", "qat"}
    made = [PASSES[name](**options, **({"training": TRAINING} if name in trains else {})) for name, options in passes]
    through, killed, resumed = Watching(), Watching(die), Watching()
    expected = compressed(None, made, through)
    with pytest.raises(Killed):
        compressed(tmp_path, made, killed)
    assert list((tmp_path / "out.run" / "work").glob("*-training-*.safetensors"))
    found = compressed(tmp_path, made, resumed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(each, expected[name]) for name, each in found.items())
    assert resumed.steps == through.steps[-len(resumed.steps) :], "the training goes on where it was saved last"
    assert len(resumed.steps) < len(through.steps) and killed.steps[-1] in resumed.steps
    assert not list((tmp_path / "out.run" / "work").glob("*-training-*")), "gone when the stage is finished"
