"""Any `Runner` as a language model of lm-eval, so that its tasks run on every runtime alike.

Imports lm-eval: import this file only after `definitions.require_lm_eval`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from typing_extensions import override

from llmcompress.calibration.tokens import refuse_beyond_embedding
from llmcompress.errors import CompressError
from llmcompress.evaluation.tasks.continuations import Continuation, likelihoods
from llmcompress.evaluation.tasks.generating import generate_until_strings
from llmcompress.progress import Progress
from llmcompress.runners.base import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LIMIT = 2048
"""Tokens that a model without a limit reads at once: what lm-eval takes where a config names none."""

Edit = Callable[[str], str]
"""What is done to a prompt before the model reads it: noise, or another wording."""


class RunnerLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no type information
    """Answers the three kinds of requests of lm-eval, tokenised and truncated as by its own `HFLM`.

    Differs: log-softmax is always taken in float32; `HFLM` takes it in the model's dtype unless told otherwise.
    Generation is greedy and without the settings that come with the model (repetition penalty).
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: PreTrainedTokenizerBase,
        *,
        progress: Progress,
        edit: Edit | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._runner, self._progress, self._edit = runner, progress, edit
        self._device = runner.device

    @property
    @override
    def eot_token_id(self) -> int | None:
        end: int | None = self.tokenizer.eos_token_id
        return end

    @property
    @override
    def prefix_token_id(self) -> int:
        """What comes before a text without a context.

        Raises: CompressError when the tokenizer has no such token.
        """
        bos = self.tokenizer.bos_token_id
        prefix = self.tokenizer.eos_token_id if bos is None else bos
        if prefix is None:
            raise CompressError(
                "tasks.no-prefix",
                "the task scores texts without a context, but the tokenizer has neither a BOS nor an EOS token",
                fix="set one: tokenizer.bos_token = ..., or leave the task out",
            )
        return int(prefix)

    @property
    def max_length(self) -> int:
        """The most tokens that are read at once."""
        return self._runner.max_positions or NO_LIMIT

    @property
    def max_gen_toks(self) -> int:
        """Generated where a task names no limit."""
        return 256

    @property
    @override
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @override
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """As the tokenizer does by default, but never two BOS tokens."""
        if add_special_tokens is None and self._begins_with_prefix(string):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        found: list[int] = self.tokenizer.encode(string, **options)
        return found

    def _begins_with_prefix(self, string: str) -> bool:
        known = self.tokenizer.bos_token_id is not None or self.tokenizer.eos_token_id is not None
        return known and string.startswith(self.tokenizer.decode(self.prefix_token_id))

    @override
    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Tokenised by lm-eval's own code; progress is shown by ours."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    @override
    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        pair: tuple[list[int], list[int]] = super()._encode_pair(self._edited(context), continuation)
        return pair

    def _edited(self, context: str) -> str:
        """Never empty: a text without a context is another question."""
        return (self._edit(context) or context) if self._edit else context

    @override
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        asked = [self._continuation(context, continuation) for _, context, continuation in requests]
        tokens = (torch.tensor(each.inputs + each.targets) for each in asked)
        refuse_beyond_embedding(tokens, self.tokenizer, self._runner.vocabulary, where="a task's prompt")
        answers = likelihoods(self._runner, asked, progress=self._progress, title="answers of tasks")
        return [(each.log_likelihood, each.is_greedy) for each in answers]

    def _continuation(self, context: Sequence[int], continuation: Sequence[int]) -> Continuation:
        """What does not fit is cut off on the left, as `HFLM` does."""
        if len(continuation) > self.max_length:
            raise CompressError(
                "tasks.too-long",
                f"an answer has {len(continuation)} tokens, more than the {self.max_length} that the model reads",
                fix="leave this task out, or use a model with a longer context",
            )
        everything = (*context, *continuation)[-(self.max_length + 1) :]
        return Continuation(everything[:-1], tuple(continuation))

    @override
    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Every document by itself, in windows of which each predicts tokens that no other one does."""
        windows = [
            (number, make_disjoint_window(window))
            for number, request in enumerate(requests)
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
        ]
        answers = self._loglikelihood_tokens([(None, *window) for _, window in windows])
        sums = [0.0] * len(requests)
        for (number, _), (log_likelihood, _) in zip(windows, answers, strict=True):
            sums[number] += log_likelihood
        return sums

    @override
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations, cut at the first of the task's stop strings or the end of the text.

        Raises: CompressError for a task that samples, or asks for more tokens than the model can hold.
        """
        found = [""] * len(requests)
        by_settings = sorted(range(len(requests)), key=lambda index: repr(requests[index].args[1]))
        for _, group in groupby(by_settings, key=lambda index: repr(requests[index].args[1])):
            indices = list(group)
            texts = self._generated([requests[index].args[0] for index in indices], requests[indices[0]].args[1])
            for index, text in zip(indices, texts, strict=True):
                found[index] = text
        return found

    def _generated(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        wanted = normalize_gen_kwargs(dict(settings), self.max_gen_toks)
        if wanted.get("do_sample"):
            raise CompressError(
                "tasks.sampling",
                "the task samples its answers, and only greedy generation is the same in every runtime",
                fix="leave this task out",
            )
        end = self.eot_token_id
        eos = None if end is None else self.tokenizer.decode(end, skip_special_tokens=False)
        until = handle_stop_sequences(wanted.get("until"), eos=eos)
        most = int(wanted["max_gen_toks"])
        room = self.max_length - most
        if room <= 0:
            raise CompressError(
                "tasks.too-long",
                f"the task generates up to {most} tokens, and the model holds {self.max_length} in all",
                fix="leave this task out, or use a model with a longer context",
            )
        texts = generate_until_strings(
            self._runner,
            self.tokenizer,
            [self.tok_encode(self._edited(context))[-room:] or [self.prefix_token_id] for context in contexts],
            until=until,
            max_new_tokens=most,
            progress=self._progress,
        )
        return [postprocess_generated_text(generation=text, stop=until, think_end_token=None) for text in texts]

    @override
    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The tokenizer's own template; without the system message where the template refuses it."""
        try:
            return self._chat(chat_history, add_generation_prompt)
        except TemplateError:
            return self._chat([each for each in chat_history if each["role"] != "system"], add_generation_prompt)

    def _chat(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text
