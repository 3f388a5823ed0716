"""Calibration without data: text sampled from the model itself. N = texts, T = tokens, V = vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.calibration.tokens import starts_with_bos
from llmcompress.errors import CompressError
from llmcompress.modules.cache_names import cache_of, with_cache
from llmcompress.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FEWEST_GREEDY, MOST_GREEDY = 3, 5
"""A text takes its direction from its first tokens: the likeliest ones; the rest is sampled for variety."""


@torch.no_grad()  # not inference_mode: what is returned may meet autograd later
def self_generated_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    tokens: int,
    seed: int,
    batch: int = 8,
    progress: Progress | None = None,
) -> Tensor:
    """`samples` × `tokens` token ids sampled from the model, the same for the same seed.

    Every text starts with a random token of the ordinary vocabulary (after BOS, if the tokenizer adds one), continues
    greedily for three to five tokens, and is then sampled at temperature 1. When a text ends with EOS, the next one
    starts in the same row.

    Source: Liu et al., arXiv 2305.17888, section 3.1 (LLM-QAT). Differs: start tokens are random instead of taking the
    vocabulary in turn; rows are always full.
    Raises: CompressError `numerics.not-finite` if the model's logits are not finite.
    """
    progress = progress or Silent()
    random = torch.Generator().manual_seed(seed)
    ordinary = _ordinary_tokens(model, tokenizer)
    bos = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    # everything random is drawn beforehand, so a text does not depend on which texts share its batch
    starts_NT = ordinary[torch.randint(len(ordinary), (samples, tokens), generator=random)]
    greedy_NT = torch.randint(FEWEST_GREEDY, MOST_GREEDY + 1, (samples, tokens), generator=random)
    uniform_NT = torch.rand(samples, tokens, generator=random, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        parts = []
        for first in range(0, samples, batch):
            rows = slice(first, first + batch)
            writer = _Writer(model, tokenizer.eos_token_id, starts_NT[rows], greedy_NT[rows], uniform_NT[rows])
            parts.append(writer.write(bos, tokens, progress, done=first, of=samples))
    finally:
        model.train(was_training)
    return torch.cat(parts)


class _Writer:
    """Some rows being written together."""

    def __init__(
        self, model: PreTrainedModel, eos: int | None, starts_NT: Tensor, greedy_NT: Tensor, uniform_NT: Tensor
    ) -> None:
        self.model, self.eos = model, eos
        self.starts_NT, self.greedy_NT, self.uniform_NT = starts_NT, greedy_NT, uniform_NT
        self.device = model.get_input_embeddings().weight.device
        self.cache: Any = None

    def write(self, bos: list[int], tokens: int, progress: Progress, *, done: int, of: int) -> Tensor:
        rows = len(self.starts_NT)
        text_NT = torch.empty(rows, tokens, dtype=torch.long)
        text_NT[:, : len(bos)] = torch.tensor(bos, dtype=torch.long)
        text_NT[:, len(bos)] = self.starts_NT[:, 0]
        age_N = torch.ones(rows, dtype=torch.long)  # tokens since the text of the row began
        for position in range(len(bos) + 1, tokens):
            logits_NV = self._logits(text_NT[:, :position])
            greedy_N = age_N <= self.greedy_NT[:, position]
            next_N = torch.where(greedy_N, logits_NV.argmax(-1), _sampled(logits_NV, self.uniform_NT[:, position]))
            if self.eos is not None:
                ended_N = text_NT[:, position - 1] == self.eos
                next_N = torch.where(ended_N, self.starts_NT[:, position], next_N)
                age_N[ended_N] = 0
            text_NT[:, position] = next_N
            age_N += 1
            if position % 32 == 0:
                written = done * tokens + rows * position
                progress.substep("writing calibration text", done=written, total=of * tokens)
        return text_NT

    def _logits(self, text_NT: Tensor) -> Tensor:
        """Of the next token, in float64, with the cache where the model has one."""
        new_NT = text_NT if self.cache is None else text_NT[:, -1:]
        cache = with_cache(self.model.forward, self.cache)
        output = self.model(input_ids=new_NT.to(self.device), **cache, use_cache=True)
        self.cache = cache_of(output)
        logits_NV: Tensor = output.logits[:, -1].cpu().double()
        if not bool(logits_NV.isfinite().all()):
            raise CompressError(
                "numerics.not-finite",
                f"the model's logits became NaN or Inf while generating calibration text (token {text_NT.shape[1]})",
                where="calibration.source",
                fix="check the model with `llmcompress evaluate`; use another source",
            )
        return logits_NV


def _sampled(logits_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """By inverting the cumulative distribution, so that one number decides one token."""
    cumulative_NV = torch.softmax(logits_NV, dim=-1).cumsum(-1)
    wanted_N1 = uniform_N[:, None] * cumulative_NV[:, -1:]
    return torch.searchsorted(cumulative_NV, wanted_N1, right=True).squeeze(1).clamp_max(logits_NV.shape[1] - 1)


def _ordinary_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Tokens that have an embedding and are not special (nor added later: markers of all kinds)."""
    rows = model.get_input_embeddings().weight.shape[0]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return torch.tensor([token for token in range(min(rows, len(tokenizer))) if token not in special])
