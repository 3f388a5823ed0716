"""`distill`, and `recover` with a teacher: who teaches, what is refused before any work, and what stays as it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import llmcompress
from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES, Pass
from llmcompress.progress import Silent
from llmcompress.run import Run
from tests.families import tiny_model, tiny_tokens
from tests.tiny_folder import write_tiny_llama

TRAINING = {"steps": 6, "batch": 2, "learning_rate": 3e-3, "save_every": 2, "validation": 0.25}
IDS = tiny_tokens("llama", batch=8)
SPARSE = ("random", {"sparsity": 0.5})


def observable(seed: int = 0) -> PreTrainedModel:
    """With the attention that a loaded model has; the tiny ones are `eager`."""
    model = tiny_model("llama", seed=seed)
    model.set_attn_implementation("sdpa")
    return model


class Fixed:
    """Teachers in memory, and how often each was asked for."""

    def __init__(self, **seeds: int) -> None:
        self._seeds = {"original": 0, **seeds}
        self.loaded: list[str] = []
        self.dtypes: list[torch.dtype] = []

    def model(self, name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        self.loaded.append(name)
        self.dtypes.append(dtype)
        return observable(self._seeds[name]).to(dtype)

    def identity(self, name: str) -> Mapping[str, str]:
        return {"weights": name}

    def vocabulary(self, name: str) -> int:
        return int(tiny_model("llama").config.vocab_size)

    def tokenizer(self, name: str) -> Any:
        raise AssertionError(f"the tokenizer of {name} is not needed")


def passes(*named: tuple[str, dict[str, Any]]) -> list[Pass]:
    return [
        PASSES[name](**({"training": TRAINING} if name in ("recover", "distill") else {}) | options)
        for name, options in named
    ]


def trained(*named: tuple[str, dict[str, Any]], teachers: Fixed | None = None, **context: Any) -> PreTrainedModel:
    model = observable()
    run = RunContext(IDS, teachers=teachers or Fixed(), **context)
    return apply_passes(model, map_model(model), passes(*named), run).model


def divergence(model: nn.Module, teacher: nn.Module) -> float:
    """Mean KL(teacher ‖ model) on the text."""
    with torch.no_grad():
        p, q = (each(IDS).logits.log_softmax(-1) for each in (teacher, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def linears(model: nn.Module) -> list[Tensor]:
    return [each.weight for name, each in model.named_modules() if isinstance(each, nn.Linear) and "layers" in name]


every_objective = pytest.mark.parametrize(
    "how",
    [
        ("recover", {"teacher": "original"}),
        ("recover", {"teacher": "original", "rank": 4}),
        ("distill", {}),
        ("distill", {"objective": {"skew_kl": {"direction": "reverse"}, "hidden_states": {"factor": 0.1}}}),
        ("distill", {"objective": {"jsd": {}}, "on_policy": {"fraction": 0.5, "prompt": 4, "tokens": 4}}),
        ("distill", {"objective": {"minillm": {"pretraining": 0}}, "on_policy": {"prompt": 4, "tokens": 4}}),
        ("distill", {"objective": {"attention_relations": {"layers": "uniform"}, "kl": {}}}),
        ("distill", {"objective": {"hidden_states": {"layers": "kept"}, "kl": {}, "adversarial": {}}}),
        ("distill", {"objective": {"mutual": {"weight": 10.0}}}),
        ("distill", {"objective": {"cross_entropy": {}}, "on_policy": {"by": "teacher", "prompt": 4, "tokens": 4}}),
    ],
    ids=lambda how: " ".join([how[0], *map(str, how[1].get("objective", how[1]))]),
)


@every_objective
def test_a_pruned_model_comes_closer_to_its_dense_self_and_keeps_its_zeros(how: tuple[str, dict[str, Any]]) -> None:
    dense, pruned, teachers = tiny_model("llama"), trained(SPARSE), Fixed()
    model = trained(SPARSE, how, teachers=teachers)
    assert teachers.loaded == ["original"]
    if "cross_entropy" not in how[1].get("objective", {}):  # six steps on sampled text show nothing
        assert divergence(model, dense) < divergence(pruned, dense)
    for after, before in zip(linears(model), linears(pruned), strict=True):
        assert torch.equal(after == 0, before == 0)


@every_objective
def test_with_mixed_precision_a_teacher_that_does_not_learn_is_in_bfloat16(how: tuple[str, dict[str, Any]]) -> None:
    pruned, teachers, (name, options) = trained(SPARSE), Fixed(), how
    lower = {**options, "training": {**TRAINING, "mixed_precision": "bf16"}}
    model = trained(SPARSE, (name, lower), teachers=teachers)
    learns = "mutual" in options.get("objective", {})
    assert teachers.dtypes == [torch.float32 if learns else torch.bfloat16]
    assert all(each.dtype == torch.float32 for each in model.parameters())
    if "cross_entropy" not in options.get("objective", {}):
        assert divergence(model, tiny_model("llama")) < divergence(pruned, tiny_model("llama"))


@pytest.mark.parametrize(
    ("options", "less"), [({}, 0.5), ({"objective": {"mutual": {}}}, 0), ({"stored": {"folder": "scores"}}, 0)]
)
def test_a_teacher_in_bfloat16_counts_half_in_the_estimate(options: dict[str, Any], less: float) -> None:
    exact, lower = (
        PASSES["distill"](training={**TRAINING, "mixed_precision": given}, **options).backward()
        for given in (None, "bf16")
    )
    assert exact is not None and lower is not None
    assert exact.of_all - lower.of_all == less


def test_several_teachers_teach_their_mixture() -> None:
    teachers = Fixed(a=1, b=1)
    both = trained(("distill", {"teacher": ["a", "b"], "weights": [1, 3], "gate": "entropy"}), teachers=teachers)
    assert sorted(teachers.loaded) == ["a", "b"]
    one = trained(("distill", {"teacher": "a"}), teachers=Fixed(a=1))
    found, expected = (divergence(each, tiny_model("llama", seed=1)) for each in (both, one))
    assert found == pytest.approx(expected, rel=1e-3)  # identical teachers are one, up to the order of sums


def test_a_stored_teacher_is_loaded_for_the_first_student_alone(tmp_path: Path) -> None:
    options = {"stored": {"folder": str(tmp_path / "teacher"), "tokens": 32}}
    first, second = Fixed(), Fixed()
    models = [trained(SPARSE, ("distill", options), teachers=each) for each in (first, second)]
    assert first.loaded == ["original"] and not second.loaded
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert divergence(models[0], tiny_model("llama")) < divergence(trained(SPARSE), tiny_model("llama"))


class Killed(Exception):
    pass


class Watching(Silent):
    def __init__(self, die: str = "never") -> None:
        self._die = die

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        if self._die in text:
            raise Killed


def test_killed_and_resumed_equals_uninterrupted_on_generated_text(tmp_path: Path) -> None:
    how = ("distill", {"objective": {"jsd": {}}, "on_policy": {"fraction": 0.5, "prompt": 4, "tokens": 4}})
    through = trained(SPARSE, how)

    def once(die: str) -> PreTrainedModel:
        with Run.open(tmp_path / "out", fingerprint={}, lock_text="", fresh=False) as run:
            return trained(SPARSE, how, keep=run, progress=Watching(die))

    with pytest.raises(Killed):
        once("distill: step 5/6")
    again = once("never")
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), again.parameters(), strict=True))


MINILLM, TEACHERS = {"minillm": {}}, {"teacher": ["a", "b"]}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"objective": {}}, "at least one objective"),
        ({"objective": {"kll": {}}}, "kl"),
        ({"objective": {"kl": {"beta": 1}}}, "beta"),
        ({"objective": {"cross_entropy": {}}}, "no objective reads the teacher"),
        ({"objective": MINILLM}, "set `on_policy`"),
        ({"objective": {"contrastive": {}}}, "set `on_policy`"),
        ({"objective": MINILLM, "on_policy": {"by": "teacher"}}, "remove `by: teacher`"),
        ({"objective": {"kl": {"weight": 0.5}}, "on_policy": {}}, "set `weight: 1`"),
        ({"objective": {"kl": {}, "cross_entropy": {}}, "on_policy": {}}, "teaches nothing"),
        ({"on_policy": {"adaptive": True}}, "training.validation"),
        ({"on_policy": {}, "stored": {"folder": "x"}}, "remove `stored`"),
        ({"objective": {"hidden_states": {}}, "stored": {"folder": "x"}}, "remove `stored`"),
        ({"objective": {"kl": {"temperature": 2}, "jsd": {}}, "stored": {"folder": "x"}}, "one temperature"),
        ({**TEACHERS, "weights": [1]}, "2 teachers have 1 weights"),
        ({**TEACHERS, "weights": [1, 0]}, "above zero"),
        ({**TEACHERS, "stored": {"folder": "x"}}, "several teachers"),
        ({**TEACHERS, "objective": {"hidden_states": {}}}, "several teachers"),
        ({**TEACHERS, "objective": MINILLM, "on_policy": {}}, "several teachers"),
        ({"teacher": []}, "at least one teacher"),
        ({"gate": "entropy"}, "several teachers"),
        ({"objective": {"mutual": {}, "kl": {}}}, "by `mutual` alone"),
        ({"objective": {"mutual": {}}, **TEACHERS}, "several teachers"),
        ({"objective": {"universal_logit": {}}, "stored": {"folder": "x"}}, "remove `stored`"),
        ({"objective": {"universal_logit": {}}, "on_policy": {}}, "set `weight: 1`"),
        ({"vocabulary": "sorted"}, "universal_logit"),
        ({"vocabulary": "matched", "objective": {"hidden_states": {}}}, "divergences of logits"),
        ({"vocabulary": "matched", "on_policy": {"by": "teacher"}}, "remove `vocabulary`"),
        ({"vocabulary": "matched", **TEACHERS}, "remove `vocabulary`"),
        ({"vocabulary": "matched", "objective": {"kl": {"temperature": 2}, "jsd": {}}}, "one temperature"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_do_not_fit_together_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PASSES["distill"](**options)


def recipe(teacher: str, **options: Any) -> dict[str, Any]:
    return {
        "calibration": {"samples": 4, "tokens": 16},
        "passes": [{"distill": {"teacher": teacher, "training": {"steps": 1, "batch": 2}, **options}}],
        "evaluate": {},
    }


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A student, and a teacher whose embedding is padded to another size."""
    student = write_tiny_llama(tmp_path / "student", dtype=torch.float32)
    return student, write_tiny_llama(tmp_path / "teacher", dtype=torch.float32, hidden_size=48, vocab_size=304)


def test_vocabularies_may_be_padded_differently(folders: tuple[Path, Path]) -> None:
    """With every form of a teacher; the student's own padding is left as it is."""
    student, teacher = folders
    for options in (
        {}, {"stored": {"folder": str(student.parent / "stored"), "tokens": 8}},
        {"on_policy": {"prompt": 4, "tokens": 4, "by": "teacher"}},
    ):  # fmt: skip
        made = llmcompress.compress(str(student), recipe(str(teacher), **options))
        assert made.model.config.vocab_size == 288


def test_another_vocabulary_is_refused_before_weights_are_read(folders: tuple[Path, Path]) -> None:
    student, teacher = folders
    file = teacher / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    (one, first), (two, second) = list(words.items())[100:102]
    words[one], words[two] = second, first
    file.write_text(json.dumps(tokenizer))
    for folder in folders:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100] + b"\xff" * 100)  # NaN, which loading would tell
    with pytest.raises(CompressError) as caught:
        llmcompress.compress(str(student), recipe(str(teacher)))
    assert caught.value.code == "training.vocabulary" and "2 of them different" in caught.value.what


@pytest.mark.parametrize(
    "how", [{"vocabulary": "matched"}, {"vocabulary": "sorted", "objective": {"universal_logit": {}}}], ids=str
)
def test_another_vocabulary_is_mapped_when_that_is_asked_for(folders: tuple[Path, Path], how: dict[str, Any]) -> None:
    student, teacher = folders
    file = teacher / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = merges[:-8]  # the last words are spelled out
    (one, first), (two, second) = list(words.items())[100:102]
    words[one], words[two] = second, first
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(CompressError, match="another vocabulary"):
        llmcompress.compress(str(student), recipe(str(teacher)))
    dense = llmcompress.load(student)
    for given in (str(student), dense.model):
        made = llmcompress.compress(
            given, recipe(str(teacher), **how), tokenizer=None if isinstance(given, str) else dense.tokenizer
        )
        assert all(bool(torch.isfinite(each).all()) for each in made.model.parameters())
        assert any(row.algorithm == "distill" for row in made.report.sites)


def test_the_calibration_error_of_a_mixture_and_of_its_members_is_told() -> None:
    notes: list[str] = []

    class Told(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    trained(("distill", {"teacher": ["a", "b"]}), teachers=Fixed(a=1, b=2), progress=Told())
    (told,) = (note for note in notes if "calibration error" in note)
    with torch.no_grad():
        each = [observable(seed)(IDS).logits[:, :-1].softmax(-1) for seed in (1, 2)]
    for name, probabilities in zip(("mixture of the teachers", "a", "b"), [sum(each) / 2, *each], strict=True):
        best, at = probabilities.flatten(0, 1).max(-1)
        gaps = (best - (at == IDS[:, 1:].flatten()).float())[best.argsort(stable=True)].double()
        bins = torch.arange(len(gaps)) * 15 // len(gaps)
        error = sum(abs(float(gaps[bins == number].sum())) for number in range(15)) / len(gaps)
        assert f"{name} {error:.4f}" in told


def test_the_original_of_a_model_in_memory_is_gone(folders: tuple[Path, Path]) -> None:
    loaded = llmcompress.load(folders[0])
    with pytest.raises(CompressError) as caught:
        llmcompress.compress(loaded.model, recipe("original"), tokenizer=loaded.tokenizer)
    assert caught.value.code == "training.original"
