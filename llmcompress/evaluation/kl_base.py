"""A KL base file of llama-perplexity as a text to measure on, with the dense model's scores; and how to write one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.calibration.sources import paragraph_hashes
from llmcompress.calibration.tokens import starts_with_bos
from llmcompress.errors import CompressError, ExitCode
from llmcompress.evaluation.scores import WindowScores, log_probabilities, score
from llmcompress.evaluation.settings.perplexity import DEFAULT_PROTOCOL, PerplexityTask
from llmcompress.evaluation.texts import EvaluationText
from llmcompress.progress import Progress
from llmcompress.runners.base import Runner
from llmcompress.runners.kl_base import MAGIC, KlBase, write_kl_base
from llmcompress.storage.atomic import replacing
from llmcompress.storage.paths import from_home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def kl_base_path(source: str) -> Path | None:
    """The file that a text's source names, if it is a KL base file."""
    path = Path() if source.startswith("builtin:") else from_home(source)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return path if file.read(len(MAGIC)) == MAGIC else None


def kl_base_text(
    path: Path, task: PerplexityTask, tokenizer: PreTrainedTokenizerBase, *, embedding_rows: int
) -> EvaluationText:
    """The file's chunks as windows, by llama-perplexity's protocol: a BOS that the tokenizer adds replaces the first
    token of each, and the second half is scored.

    Raises: CompressError for a damaged file, and for one of a model with another vocabulary.
    """
    base = KlBase(path)
    if base.vocabulary != embedding_rows:
        raise CompressError(
            "evaluate.other-tokens",
            f"{path.name} is of a model with {base.vocabulary:,} tokens, this one has {embedding_rows:,}",
            where=f"evaluate.perplexity: {path.name}",
            fix="write the file with the dense model that this one was made from",
            exit_code=ExitCode.USAGE,
        )
    changed = task.protocol_name not in (DEFAULT_PROTOCOL, own := _protocol(base.chunk))
    if changed or (task.window is not None and task.window != base.chunk) or task.bos not in ("auto", "replace"):
        raise CompressError(
            "evaluate.protocol",
            f"{path.name} was written by the protocol {own}, and can be measured by no other",
            where=f"evaluate.perplexity: {path.name}",
            fix="give the file alone, at most with `max_windows` and `top`",
            exit_code=ExitCode.USAGE,
        )
    most = task.max_windows if isinstance(task.max_windows, int) else base.chunks
    windows_CW = base.tokens_CW[:most].long()
    bos = starts_with_bos(tokenizer)
    if bos:
        windows_CW[:, 0] = tokenizer.bos_token_id
    skipped = base.chunk // 2
    chunks: list[list[int]] = windows_CW.tolist()
    scored = [tokenizer.decode(chunk[1 + skipped :], clean_up_tokenization_spaces=False) for chunk in chunks]
    return EvaluationText(
        path.name,
        hashlib.sha256(windows_CW.numpy().tobytes()).hexdigest(),
        tuple(windows_CW),
        base.chunk,
        bos,
        sum(len(text.encode()) for text in scored),
        paragraph_hashes(tokenizer.decode(chunk[1:]) for chunk in chunks),
        base.chunks * base.chunk,
        skipped=(skipped,) * len(windows_CW),
        protocol=own,
    )


def _protocol(chunk: int) -> str:
    return PerplexityTask.model_validate({"protocol": "llama-cpp", "window": chunk}).protocol_name


def kl_base_scores(path: Path, text: EvaluationText, *, top: int) -> list[WindowScores]:
    """What the file says of its text: the dense model's scores."""
    with KlBase(path) as base:
        return list(score(base, text.windows, skipped=text.skipped, top=top, name=path.name))


def save_kl_base(path: Path, runner: Runner, text: EvaluationText, progress: Progress) -> None:
    """Run a model on a text that was read by the protocol `llama-cpp`, and write its log-probabilities.

    Raises: CompressError for a text that was read by another protocol.
    """
    half = text.window // 2
    if any(len(window) != text.window for window in text.windows) or set(text.skips) != {half}:
        raise CompressError(
            "evaluate.kl-base",
            "a KL base file holds chunks of equal length with their second half scored",
            where=f"evaluate.perplexity: {text.name}",
            fix="set `protocol: llama-cpp`",
            exit_code=ExitCode.USAGE,
        )
    with replacing(path) as unfinished:
        write_kl_base(unfinished, torch.stack(text.windows), _logits(runner, text, progress), runner.vocabulary)


def _logits(runner: Runner, text: EvaluationText, progress: Progress) -> Iterator[Tensor]:
    progress.stage(f"scores on {text.name}", len(text.windows))
    for piece in log_probabilities(runner, text.windows, text.skips):
        yield piece.logprobs_RV
        if piece.start + len(piece.targets_R) == text.lengths[piece.window]:
            progress.step(f"window {piece.window + 1}/{len(text.windows)}")
