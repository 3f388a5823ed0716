"""A teacher with another tokenizer, which reads the student's text in its own tokens.

B = samples, R = rows (positions of all samples of the student), K = tokens that both spell alike,
V, W = vocabularies of student and teacher.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.calibration.tokens import max_positions
from llmcompress.training.data.batch import Batch, Sample, padded
from llmcompress.training.features import Wanted
from llmcompress.training.on_policy import given_samples
from llmcompress.training.targets import MatchedTokens, OtherVocabulary, TeacherRows
from llmcompress.training.teacher import ModelTeacher, TeacherPredictions
from llmcompress.training.text_alignment import Pair

Mapping = Literal["sorted", "matched"]
"""sorted: probabilities without their tokens; matched: tokens that both spell alike, and all others together."""


class OtherVocabularyTeacher:
    """Speaks where both tokenizers have read the same text: what both predict there follows the same characters.

    Source: Wan et al., arXiv 2401.10491, section 3.3 (FuseLLM: tokens that are spelled alike). Differs: tokens without
    a match become one event instead of going to the token with the smallest edit distance, and positions are those at
    which both tokens end at the same character.
    """

    vocabulary: int | None = None

    def __init__(self, teacher: ModelTeacher, pair: Pair, mapping: Mapping, *, temperature: float = 1.0) -> None:
        self._teacher, self._pair, self._temperature = teacher, pair, temperature
        self._matched = tuple(map(torch.tensor, pair.matched())) if mapping == "matched" else None

    def predictions(self, batch: Batch, wanted: Wanted) -> TeacherPredictions:
        """Values are row numbers; what is beyond the teacher's longest text is not known."""
        device = batch.ids_BT.device
        texts = [self._pair.aligned(sample.ids_T.tolist()) for sample in given_samples(batch)]
        longest = max_positions(self._teacher.model.config)
        own = padded([Sample(torch.tensor(text.ids[:longest] or [0], dtype=torch.long)) for text in texts])
        said = self._teacher.predictions(own.to(device), Wanted())
        width = own.ids_BT.shape[1]
        rows_BT = torch.full_like(batch.ids_BT, -1, device="cpu")
        for number, text in enumerate(texts):
            there = [-1 if place is None or place >= width else number * width + place for place in text.places]
            rows_BT[number, : len(there)] = torch.tensor(there, dtype=torch.long)
        rows_R = rows_BT.flatten().to(device)

        def rows(numbers_R1: Tensor) -> TeacherRows:
            chosen_R = rows_R[numbers_R1[:, 0]]
            logits_RW = said.rows(said.values_RX[chosen_R.clamp(min=0)])
            assert isinstance(logits_RW, Tensor), "a model says logits"
            return self._mapped(logits_RW, chosen_R >= 0)

        return TeacherPredictions(torch.arange(len(rows_R), device=device)[:, None], rows)

    def _mapped(self, logits_RW: Tensor, known_R: Tensor) -> TeacherRows:
        if self._matched is None:
            return OtherVocabulary(logits_RW, known_R)
        mine_K, theirs_K = (each.to(logits_RW.device) for each in self._matched)
        log_RW = functional.log_softmax(logits_RW / self._temperature, -1)
        ids_RK = mine_K.expand(len(log_RW), -1)
        tail_R = log_RW.index_fill(-1, theirs_K, float("-inf")).logsumexp(-1)
        return MatchedTokens(ids_RK, log_RW[:, theirs_K], self._temperature, tail_R, known_R)
