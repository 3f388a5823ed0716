"""Models that write texts and judge them, while training examples are made. T = tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from llmcompress.calibration.tokens import max_positions, starts_with_bos, token_lists
from llmcompress.errors import CompressError
from llmcompress.training.data.batch import IGNORED, Sample, padded
from llmcompress.training.generation import Share, drawn
from llmcompress.training.head import find_head, predictions, rows_at_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Drawing:
    """How texts are drawn."""

    tokens: int
    """The most that is written."""
    temperature: float
    """0: always the likeliest token."""
    seed: int


@dataclass(frozen=True)
class Author:
    """A model with its tokenizer, in eval mode on its device."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device

    def continued(self, prompts: Sequence[str], how: Drawing) -> list[str]:
        """The texts that follow the prompts, up to the model's end of text; special tokens are left out.

        Raises: CompressError where a prompt leaves no room for `how.tokens` more.
        """
        ids = [torch.tensor(self._begun(prompt), device=self.device) for prompt in prompts]
        longest = max_positions(self.model.config)
        for prompt, prompt_T in zip(prompts, ids, strict=True):
            if longest is not None and len(prompt_T) + how.tokens > longest:
                raise CompressError(
                    "data.too-long",
                    f"a prompt of {len(prompt_T)} tokens leaves no room for {how.tokens} more in {longest} positions: "
                    f"{prompt[:60]!r}…",
                    where="data",
                    fix="use shorter prompts or passages, fewer demonstrations, or fewer `tokens`",
                )
        with torch.random.fork_rng([]):
            torch.manual_seed(how.seed)
            found = drawn(
                ids,
                [Share(self.model, 1.0)],
                tokens=how.tokens,
                stop=self._stop(),
                vocabulary=min(len(self.tokenizer), self.model.config.get_text_config().vocab_size),
                temperature=how.temperature,
            )
        return [
            str(self.tokenizer.decode(sample.ids_T[len(prompt_T) :].tolist(), skip_special_tokens=True))
            for sample, prompt_T in zip(found, ids, strict=True)
        ]

    def chat(self, system: str | None, prompt: str) -> str:
        """A question in the model's chat template, up to where it answers.

        Raises: CompressError where it has none.
        """
        if not self.tokenizer.chat_template:
            raise CompressError(
                "data.no-chat-template",
                "`form: chat` asks a model in its chat template, and its tokenizer has none",
                where="data",
                fix="set `form: prompt`, or let a model with a chat template write",
            )
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        written: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return written

    @torch.no_grad()
    def losses(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Mean cross-entropy in nats of each response after its prompt; the end of text does not count.

        What lies beyond the model's longest text is left out; a response without tokens costs nothing.
        """
        samples = []
        for prompt, response in zip(prompts, responses, strict=True):
            begun, more = self._begun(prompt), token_lists(self.tokenizer, [response])[0]
            ids_T = torch.tensor([*begun, *more])[: max_positions(self.model.config)]
            samples.append(Sample(ids_T, torch.arange(len(ids_T)) >= max(1, len(begun))))
        return [self._loss(sample) for sample in samples]

    def _loss(self, sample: Sample) -> float:
        batch = padded([sample]).to(self.device)
        rows = rows_at_once(self.model.config.get_text_config().vocab_size)
        said = predictions(self.model, batch, find_head(self.model, batch.ids_BT) if len(sample.ids_T) > rows else None)
        targets_R = batch.targets_BT.flatten()
        total = torch.zeros((), dtype=torch.float64)
        for part in torch.split((targets_R != IGNORED).nonzero().flatten(), rows):
            logits_RV = said.logits(said.values_RX[part])
            total += functional.cross_entropy(logits_RV, targets_R[part], reduction="sum").double().cpu()
        return float(total) / max(1, batch.predicted)

    def _begun(self, prompt: str) -> list[int]:
        """The prompt's tokens behind BOS; for an empty one BOS or EOS, after which a new text begins."""
        bos = [self.tokenizer.bos_token_id] if starts_with_bos(self.tokenizer) else []
        ids: list[int] = [*bos, *token_lists(self.tokenizer, [prompt])[0]]
        if prompt.startswith(str(self.tokenizer.bos_token or "\0")):  # a chat template wrote it
            ids = ids[len(bos) :]
        starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0)
        return ids or [next(token for token in starts if token is not None)]

    def _stop(self) -> frozenset[int]:
        ends = None if self.model.generation_config is None else self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return frozenset([ends] if isinstance(ends, int) else ends or [])


@dataclass(frozen=True)
class Authors:
    """Models by name, each read at its first use and then kept."""

    read: Callable[[str], Author]
    _known: dict[str, Author] = field(default_factory=dict)

    def author(self, name: str) -> Author:
        """The model of that name."""
        if name not in self._known:
            self._known[name] = self.read(name)
        return self._known[name]
