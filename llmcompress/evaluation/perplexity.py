"""Perplexity, one protocol for every model.

B = windows in a batch, W = tokens of a window, R = some of those, V = vocabulary.
The text is tokenised once and cut into windows that do not overlap; the last one may be shorter. A window sees
nothing of the windows before it. See docs/decisions/0003-perplexity-protocol.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.calibration.sources import JOINER, TextSource, paragraph_hashes, read_texts
from llmcompress.calibration.tokens import max_positions, starts_with_bos, unknown_warning, written_out
from llmcompress.errors import CompressError
from llmcompress.evaluation.settings import PerplexityTask
from llmcompress.numerics.loss import windows_at_once
from llmcompress.progress import Progress, Silent
from llmcompress.records.report import PerplexityResult

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LONGEST_DEFAULT_WINDOW = 2048
CHARACTERS_PER_TOKEN = 8
"""More than any tokenizer's average, so that a streamed text is read far enough."""

PIECE_BYTES = 2**22
"""Float32 logits that the loss is computed from at a time: about what a processor's cache holds."""


@dataclass(frozen=True)
class EvaluationText:
    """A text made ready for one model: windows of tokens, and how many bytes they predict."""

    name: str
    fingerprint: str
    windows: tuple[Tensor, ...]
    """All of `window` tokens, except that the last may be shorter."""
    window: int
    bos: bool
    predicted_bytes: int
    """Bytes of the UTF-8 text whose tokens are predicted."""
    paragraphs: frozenset[int]
    """For the overlap check with the calibration text."""
    warnings: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens predicted: in every window all but the first."""
        return sum(len(window) - 1 for window in self.windows)


def evaluation_text(
    task: PerplexityTask, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> EvaluationText:
    """Read and tokenise the text of `task`; needs no weights, so bad text is found before any work.

    Raises: CompressError when the text cannot be read or is too short, or the BOS asked for does not exist.
    """
    window, warnings = _window(task, config)
    bos = _bos(task, tokenizer)
    enough = None if task.max_windows is None else task.max_windows * window * CHARACTERS_PER_TOKEN
    where = f"evaluate.perplexity: {task.source}"
    source = TextSource(task.source, task.split, task.config, task.column)
    texts = read_texts(source, max_characters=enough, where=where)
    text = JOINER.join(written_out(texts, tokenizer, where=where)[0])
    tokens, ends = _tokens_and_byte_ends(text, tokenizer)
    unknown = unknown_warning(tokenizer, [text], [tokens])
    length = window - len(bos)
    starts = range(0, len(tokens), length)[: task.max_windows]
    pieces = [tokens[start : start + length] for start in starts]
    if not bos and pieces and len(pieces[-1]) == 1:
        pieces.pop()  # nothing comes before this token, so it cannot be predicted
    if not pieces:
        what = f"{texts.name}: there is no token to predict"
        raise CompressError("data.too-little", what, where=where, fix="use more text")
    last = starts[len(pieces) - 1] + len(pieces[-1])
    # without a BOS the first token of each window is given, not predicted: its bytes do not count
    given = [] if bos else starts[: len(pieces)]
    predicted_bytes = ends[last] - sum(ends[start + 1] - ends[start] for start in given)
    return EvaluationText(
        texts.name,
        texts.fingerprint,
        tuple(torch.tensor(bos + piece) for piece in pieces),
        window,
        bool(bos),
        predicted_bytes,
        paragraph_hashes([text]),
        tuple(warnings + ([unknown] if unknown else [])),
    )


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: PerplexityTask,
    *,
    device: torch.device | str | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Read the text of `task` and measure the model on it.

    Raises: CompressError as `evaluation_text` and `measure` do.
    """
    text = evaluation_text(task, tokenizer, model.config)
    return measure(model, text, device=device, batch=batch, progress=progress)


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    text: EvaluationText,
    *,
    device: torch.device | str | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """exp of the mean negative log-likelihood over all predicted tokens, each token with the same weight.

    `device` is where the model's inputs must be (None: where its embedding is). The windows that go through the
    model together are chosen by the size of their logits; `batch` overrides that and changes no result.

    Raises: CompressError `numerics.non-finite` naming the window, when the loss is not finite.
    """
    progress = progress or Silent()
    for warning in text.warnings:
        progress.note(f"{text.name}: {warning}")
    embedding = model.get_input_embeddings().weight
    device = embedding.device if device is None else torch.device(device)
    if batch is None:
        batch = windows_at_once(text.window, model.config.get_text_config().vocab_size)
    progress.stage(f"perplexity on {text.name}", math.ceil(len(text.windows) / batch))
    was_training = model.training
    model.eval()
    try:
        total, done = 0.0, 0
        for windows_BW in _batches(text.windows, batch):
            logits_BWV = model(input_ids=windows_BW.to(device), use_cache=False).logits
            loss = _loss(logits_BWV[:, :-1], windows_BW[:, 1:])
            if not math.isfinite(loss):
                raise _not_finite(f"the loss is {loss} in windows {done + 1} to {done + len(windows_BW)}", text)
            total += loss
            done += len(windows_BW)
            progress.step(f"window {done}/{len(text.windows)}")
    finally:
        model.train(was_training)
    mean = total / text.tokens
    if mean > math.log(torch.finfo(torch.float64).max):
        raise _not_finite(f"the mean loss is {mean:.0f} nats", text)
    return PerplexityResult(
        text=text.name,
        window=text.window,
        bos=text.bos,
        tokens=text.tokens,
        perplexity=math.exp(mean),
        bits_per_byte=total / math.log(2) / text.predicted_bytes,
    )


def _window(task: PerplexityTask, config: PretrainedConfig) -> tuple[int, list[str]]:
    limit = max_positions(config)
    if task.window is None:
        return min(limit or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW), []
    if limit is not None and task.window > limit:
        return limit, [f"windows cut from {task.window} to {limit} tokens, the model has no more positions"]
    return task.window, []


def _bos(task: PerplexityTask, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What every window starts with."""
    if task.bos == "never" or (task.bos == "auto" and not starts_with_bos(tokenizer)):
        return []
    if tokenizer.bos_token_id is None:
        what = "`bos: always`, but the tokenizer has no BOS token"
        raise CompressError("data.no-bos", what, where="evaluate.perplexity", fix="use `bos: auto`")
    return [tokenizer.bos_token_id]


def _tokens_and_byte_ends(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens of `text`, and for k = 0 … tokens the bytes of the text that the first k tokens stand for.

    What stands between two tokens belongs to the later one, and a character of several tokens to its first.
    Tokenizers in Python do not say where tokens stand: each then counts the same share of the text.
    """
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    tokens: list[int] = encoded["input_ids"]
    if not tokenizer.is_fast:
        size = len(text.encode())
        return tokens, [round(size * k / max(len(tokens), 1)) for k in range(len(tokens) + 1)]
    ends, characters = [0], 0
    for _, end in encoded["offset_mapping"]:
        end = max(end, characters)
        ends.append(ends[-1] + len(text[characters:end].encode()))
        characters = end
    ends[-1] += len(text[characters:].encode())
    return tokens, ends


def _batches(windows: tuple[Tensor, ...], batch: int) -> Iterator[Tensor]:
    """Equally long windows together; the shorter last one alone, so nothing is ever padded."""
    full = [window for window in windows if len(window) == len(windows[0])]
    for start in range(0, len(full), batch):
        yield torch.stack(full[start : start + batch])
    for window in windows[len(full) :]:
        yield window[None]


def _loss(logits_BWV: Tensor, targets_BW: Tensor) -> float:
    """Sum of the negative log-likelihoods; float32 copies exist of a few rows at a time, sums are float64."""
    vocabulary = logits_BWV.shape[-1]
    rows = max(1, PIECE_BYTES // (4 * vocabulary))
    targets_BW = targets_BW.to(logits_BWV.device)
    total = torch.zeros((), dtype=torch.float64, device=logits_BWV.device)
    for logits_WV, targets_W in zip(logits_BWV, targets_BW, strict=True):
        for logits_RV, targets_R in zip(logits_WV.split(rows), targets_W.split(rows), strict=True):
            total += functional.cross_entropy(logits_RV.float(), targets_R, reduction="none").sum(dtype=torch.float64)
    return float(total)


def _not_finite(what: str, text: EvaluationText) -> CompressError:
    return CompressError(
        "numerics.non-finite",
        f"{text.name}: {what}",
        where="evaluate.perplexity",
        fix="a half-precision overflow or a broken weight: measure the dense model alone with `llmcompress evaluate`",
    )
