"""Text drawn from a student, a teacher, or a mixture of both, token by token. B = samples, V = vocabulary."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from llmcompress.modules.cache_names import cache_of, with_cache
from llmcompress.training.data.batch import Sample


@dataclass(frozen=True)
class Share:
    """A model and its share in the distribution that tokens are drawn from."""

    model: PreTrainedModel
    share: float


class _Reader:
    """A model that reads on: the cache holds what it has read."""

    def __init__(self, model: PreTrainedModel, vocabulary: int | None, temperature: float) -> None:
        self._model, self._vocabulary, self._temperature = model, vocabulary, temperature
        self._cache: Any = None

    def probabilities(self, ids_BT: Tensor) -> Tensor:
        """B×V of the next token in float32; all of the text is given every time."""
        new_BT = ids_BT if self._cache is None else ids_BT[:, -1:]
        said = self._model(input_ids=new_BT, use_cache=True, **with_cache(self._model.forward, self._cache))
        self._cache = cache_of(said)
        logits_BV: Tensor = said.logits[:, -1, : self._vocabulary]
        if self._temperature == 0:
            return functional.one_hot(logits_BV.argmax(-1), logits_BV.shape[-1]).float()
        return (logits_BV.float() / self._temperature).softmax(-1)


@torch.no_grad()
def drawn(
    prompts: Sequence[Tensor],
    shares: Sequence[Share],
    *,
    tokens: int,
    stop: frozenset[int] = frozenset(),
    vocabulary: int | None = None,
    temperature: float = 1.0,
) -> list[Sample]:
    """The prompts continued by up to `tokens` tokens, in their order; what was written is learned, prompts are not.

    Tokens are drawn from the mixture of the distributions at that temperature (0: the likeliest token), and a text ends
    with a token in `stop`.
    Prompts of different lengths are continued apart, so that nothing is padded.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for number, prompt_T in enumerate(prompts):
        groups[len(prompt_T)].append(number)
    found: dict[int, Sample] = {}
    for numbers in groups.values():
        ids_BT = torch.stack([prompts[number] for number in numbers])
        readers = [(_Reader(each.model, vocabulary, temperature), each.share) for each in shares if each.share > 0]
        texts = _continued(ids_BT, readers, tokens, stop)
        found |= dict(zip(numbers, texts, strict=True))
    return [found[number] for number in range(len(prompts))]


def _continued(
    ids_BT: Tensor, readers: Sequence[tuple[_Reader, float]], tokens: int, stop: frozenset[int]
) -> list[Sample]:
    """Prompts of equal length."""
    begun, ends = ids_BT.shape[1], torch.tensor(sorted(stop), device=ids_BT.device, dtype=torch.long)
    running_B = torch.ones(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
    lengths_B = torch.full_like(running_B, begun, dtype=torch.long)
    for _ in range(tokens):
        mixed_BV = sum(share * reader.probabilities(ids_BT) for reader, share in readers)
        assert isinstance(mixed_BV, Tensor), "a text needs a model that writes it"
        next_B1 = _one_of(mixed_BV)
        ids_BT = torch.cat([ids_BT, next_B1], 1)
        lengths_B += running_B
        running_B &= ~torch.isin(next_B1[:, 0], ends)
        if not bool(running_B.any()):
            break
    learned_T = torch.arange(ids_BT.shape[1]) >= begun
    return [
        Sample(text_T[:length].cpu(), learned_T[:length])
        for text_T, length in zip(ids_BT, lengths_B.tolist(), strict=True)
    ]


def _one_of(probabilities_BV: Tensor) -> Tensor:
    """B×1: a token of each row, by inverting the cumulative distribution; the numbers come from the CPU's generator, so
    that a text does not depend on the device."""
    cumulative_BV = probabilities_BV.double().cumsum(-1)
    number_B1 = torch.rand(len(cumulative_BV), 1, dtype=torch.float64).to(cumulative_BV.device)
    found_B1 = torch.searchsorted(cumulative_BV, number_B1 * cumulative_BV[:, -1:], right=True)
    return found_B1.clamp_max(cumulative_BV.shape[-1] - 1)
