"""Trainings of TRL: progress, and a state in the run folder from which a killed one resumes, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments
from trl import DPOTrainer
from typing_extensions import override

from llmcompress.progress import Progress
from llmcompress.storage.checked_tensors import own_memory
from llmcompress.storage.disk import disk_errors, sha256
from llmcompress.storage.ownership import FileDigest, mark_output, written_files

_WEIGHTS = "weights.safetensors"


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Shows every step, and keeps one complete state: `step-N` gets its name when everything is in it, digests of all
    its files too."""

    def __init__(self, folder: Path | None, *, every: int, title: str, progress: Progress) -> None:
        self._folder, self._every, self._title, self._progress = folder, every, title, progress

    def latest(self) -> str | None:
        """The state to resume from. What a killed process wrote in part is removed, and what was damaged since."""
        if self._folder is None or not self._folder.exists():
            return None
        for part in self._folder.glob("checkpoint-*"):
            shutil.rmtree(part)
        for path in sorted(self._folder.glob("step-*"), reverse=True):
            if _is_intact(path):
                return str(path)
            self._progress.note(f"{self._title}: {path} is damaged and removed; the training starts at its beginning")
            shutil.rmtree(path)
        return None

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        done, total = state.global_step, state.max_steps
        self._progress.substep(f"{self._title}: step {done}/{total}", done=done, total=total)
        control.should_save = self._folder is not None and done % self._every == 0 and done < total

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        assert self._folder is not None
        older, new = list(self._folder.glob("step-*")), self._folder / f"checkpoint-{state.global_step}"
        mark_output(new, {file.name: FileDigest(file.stat().st_size, sha256(file)) for file in new.iterdir()})
        new.rename(self._folder / f"step-{state.global_step:09d}")
        for path in older:
            shutil.rmtree(path)


def _is_intact(state: Path) -> bool:
    digests = {name: digest.sha256 for name, digest in written_files(state).items() if digest}
    return bool(digests) and all(
        (state / name).is_file() and sha256(state / name) == it for name, it in digests.items()
    )


class ResumableDPO(DPOTrainer):  # type: ignore[misc]
    """Keeps every tensor of a compressed model under its own name: `save_pretrained` renames and drops some."""

    @override
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        with disk_errors(folder, saved=f"the states of this training that are complete, in {folder}"):
            super(DPOTrainer, self)._save_checkpoint(model, trial)  # TRL's own also writes a model card

    @override
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        assert output_dir is not None
        path = Path(output_dir)
        path.mkdir(parents=True, exist_ok=True)
        save_file(own_memory({name: each.detach() for name, each in self.model.named_parameters()}), path / _WEIGHTS)

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        found = load_file(Path(resume_from_checkpoint) / _WEIGHTS)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(found[name])
