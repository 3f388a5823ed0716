"""A teacher's distributions on disk: computed once, in shards that a killed run leaves complete or not at all.

<folder>/stored.json         what is stored of which teacher on which text
         NNNNN.safetensors   of some samples: kept tokens and log-probabilities of every predicted token; a digest

R = rows (predicted tokens), K = tokens kept for each, V = vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional

from llmcompress.errors import CompressError, ExitCode
from llmcompress.progress import Progress, Silent
from llmcompress.storage.atomic import replacing
from llmcompress.storage.checked_tensors import load_checked, save_checked
from llmcompress.storage.disk import disk_errors
from llmcompress.storage.json_file import read_json
from llmcompress.storage.paths import from_home
from llmcompress.training.data.base import IndexedSamples
from llmcompress.training.data.batch import IGNORED, Batch, padded
from llmcompress.training.features import Wanted
from llmcompress.training.head import rows_at_once
from llmcompress.training.on_policy import given_samples
from llmcompress.training.teacher import Teacher

SAMPLES_PER_SHARD = 64
_SAMPLES_AT_ONCE = 8
_SHORT = 2**16
"""Token ids below this take two bytes."""


class Stored(BaseModel):
    """Where and how a teacher's distributions are stored."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    folder: str = Field(min_length=1)
    """Folder of the store; a later run with the same teacher and text reads it."""
    form: Literal["top", "sampled"] = "top"
    """top: the most likely tokens and the probability of all others together, for every divergence of logits; sampled:
    tokens drawn from the teacher, for unbiased forward KL and forward skew KL."""
    tokens: int = Field(default=64, ge=1)
    """Tokens kept or drawn for every predicted token."""

    def bytes_per_token(self, vocabulary: int) -> int:
        """On disk, for every predicted token."""
        return self.tokens * ((2 if vocabulary <= _SHORT else 4) + 2) + (4 if self.form == "top" else 0)


@dataclass(frozen=True, kw_only=True)
class TeacherStore:
    """The store of one teacher on one text."""

    settings: Stored
    vocabulary: int
    """Tokens of the teacher's distribution."""
    temperature: float
    seed: int
    about: Mapping[str, str]
    """What identifies the teacher."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = field(default_factory=Silent)

    @property
    def folder(self) -> Path:
        """Of all files."""
        return from_home(self.settings.folder)

    def fill(self, teacher: Teacher, data: IndexedSamples) -> list[dict[str, Tensor]]:
        """All shards, in the order of the samples; those that are missing or damaged are computed.

        The teacher is asked for nothing where all are there.

        Raises: CompressError when the folder holds something else, or the disk is full.
        """
        if self.settings.form == "top" and self.settings.tokens >= self.vocabulary:
            raise self._refused(f"{self.settings.tokens} of {self.vocabulary} tokens leave no others", "store fewer")
        counts = [range(first, min(first + SAMPLES_PER_SHARD, data.count)) for first in self._firsts(data.count)]
        self._settle(data)
        size = self.settings.bytes_per_token(self.vocabulary)
        tokens = f", at most {size * data.count * data.longest / 1e6:.1f} MB in all" if data.longest else ""
        self.progress.note(f"teacher's distributions in {self.folder}: {size} bytes per token{tokens}")
        found = []
        for number, samples in enumerate(counts):
            self.progress.substep(f"teacher: shard {number + 1}/{len(counts)}", done=number, total=len(counts))
            found.append(self._shard(number, samples, teacher, data))
        return found

    def _firsts(self, count: int) -> range:
        return range(0, count, SAMPLES_PER_SHARD)

    def _shard(self, number: int, samples: range, teacher: Teacher, data: IndexedSamples) -> dict[str, Tensor]:
        path = self.folder / f"{number:05d}.safetensors"
        found = load_checked(path)
        if found is not None:
            return found
        if path.exists():
            self.progress.note(f"{path.name} is damaged: its {len(samples)} samples are computed again")
        computed = self._computed(number, samples, teacher, data)
        with disk_errors(path, saved=f"{number} shards in {self.folder}: run the same command again to resume"):
            save_checked(path, computed)
        return computed

    @torch.no_grad()
    def _computed(self, number: int, samples: range, teacher: Teacher, data: IndexedSamples) -> dict[str, Tensor]:
        # a generator for every shard: what is drawn does not depend on which shards were there already
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + number)
        pieces: list[dict[str, Tensor]] = []
        keys: list[bytes] = []
        counts: list[int] = []
        for first in range(samples.start, samples.stop, _SAMPLES_AT_ONCE):
            some = range(first, min(first + _SAMPLES_AT_ONCE, samples.stop))
            batch = padded([data.sample(index) for index in some])
            keys += sample_keys(batch)
            counts += (batch.targets_BT != IGNORED).sum(1).tolist()
            pieces += [self._kept(log_RV, generator) for log_RV in self._log_probs(teacher, batch.to(self.device))]
        named = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        hashes = torch.tensor([list(key) for key in keys], dtype=torch.uint8)
        return {**named, "samples": hashes, "rows": torch.tensor(counts)}

    def _log_probs(self, teacher: Teacher, batch: Batch) -> Iterator[Tensor]:
        """R×V of the predicted tokens, in order, a few at a time."""
        said = teacher.predictions(batch, Wanted())
        chosen_R = (batch.targets_BT.flatten() != IGNORED).nonzero().flatten()
        for part_R in torch.split(chosen_R, rows_at_once(self.vocabulary)):
            logits_RV = said.rows(said.values_RX[part_R])
            assert isinstance(logits_RV, Tensor), "the teacher of a store is a model"
            if logits_RV.shape[-1] != self.vocabulary:
                what = f"the teacher has {logits_RV.shape[-1]} tokens, not {self.vocabulary}"
                raise self._refused(what, "use a teacher with the same tokenizer")
            yield functional.log_softmax(logits_RV / self.temperature, -1)

    def _kept(self, log_RV: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        if self.settings.form == "sampled":
            ids_RK = torch.multinomial(log_RV.exp(), self.settings.tokens, replacement=True, generator=generator)
            found = {"log_probs": log_RV.gather(-1, ids_RK).half()}
        else:
            top_RK, ids_RK = log_RV.topk(self.settings.tokens, -1)
            others_R = log_RV.scatter(-1, ids_RK, float("-inf")).logsumexp(-1)
            found = {"log_probs": top_RK.half(), "tail": others_R.float()}
        short = torch.int16 if self.vocabulary <= _SHORT else torch.int32
        return {name: each.cpu() for name, each in {"ids": ids_RK.to(short), **found}.items()}

    def _settle(self, data: IndexedSamples) -> None:
        """That the folder is ours and holds the same."""
        what = {
            "stored": self.settings.model_dump(exclude={"folder"}),
            "vocabulary": self.vocabulary,
            "temperature": self.temperature,
            "seed": self.seed,
            "teacher": dict(self.about),
            "text": data.fingerprint,
        }
        path = self.folder / "stored.json"
        if path.exists():
            there = read_json(path, code="training.store", fix="choose another folder, or remove this one")
            other = sorted(key for key in {*what, *there} if there.get(key) != what.get(key))
            if other:
                raise self._refused(
                    f"distributions are stored here with another {', '.join(other)}",
                    "choose another folder, or remove this one",
                )
            return
        with disk_errors(path, saved="nothing was stored"):
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()):
                raise self._refused("the folder contains other files", "choose a new folder")
            with replacing(path, shared=True) as part:
                part.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")

    def _refused(self, what: str, fix: str) -> CompressError:
        return CompressError("training.store", what, where=str(self.folder), fix=fix, exit_code=ExitCode.USAGE)


def sample_keys(batch: Batch) -> Sequence[bytes]:
    """What finds a sample again: a hash of its tokens, and of which of them are predicted."""
    found = []
    for sample in given_samples(batch):
        assert sample.learned_T is not None, "`given_samples` says it"
        content = sample.ids_T.numpy().tobytes() + sample.learned_T.numpy().tobytes()
        found.append(hashlib.blake2b(content, digest_size=16).digest())
    return found
