"""A buffer of texts that were generated earlier; the oldest make room. T = tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmcompress.training.data.batch import Sample


class ReplayBuffer:
    """Texts with the marks of what is learned of them."""

    def __init__(self, size: int) -> None:
        self._texts: deque[Sample] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, texts: Sequence[Sample]) -> None:
        """Behind the others."""
        self._texts.extend(texts)

    def some(self, count: int) -> list[Sample]:
        """Different ones, drawn from torch's random numbers."""
        return [self._texts[int(index)] for index in torch.randperm(len(self._texts))[:count]]

    def state(self) -> dict[str, Tensor]:
        """All texts one after the other, and how long each and its prompt is."""
        lengths = [(len(each.ids_T), len(each.ids_T) - int(_learned(each).sum())) for each in self._texts]
        ids_T = torch.cat([each.ids_T for each in self._texts]) if self._texts else torch.zeros(0, dtype=torch.long)
        return {"ids": ids_T, "lengths": torch.tensor(lengths, dtype=torch.long).view(-1, 2)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """What `state` returned."""
        self._texts.clear()
        lengths = state["lengths"].tolist()
        texts = torch.split(state["ids"], [length for length, _ in lengths]) if lengths else ()
        for ids_T, (length, prompt) in zip(texts, lengths, strict=True):
            self._texts.append(Sample(ids_T, torch.arange(length) >= prompt))


def _learned(text: Sample) -> Tensor:
    assert text.learned_T is not None, "what a model wrote is learned, and its prompt is not"
    return text.learned_T
