"""Scores of the dense model, computed once per model and text and then cached. N = tokens, K = top tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from llmcompress.evaluation.perplexity import watched
from llmcompress.evaluation.reductions import AgainstDense, Perplexity, feed
from llmcompress.evaluation.scores import WindowScores, score
from llmcompress.evaluation.texts import EvaluationText
from llmcompress.progress import Progress
from llmcompress.records.measurements import Measurement, PerplexityResult
from llmcompress.runners.base import Runner
from llmcompress.storage.cache import TensorCache

TOP = 64
"""Likely tokens that are kept of every distribution, with 8 bytes each: 524 bytes per token of text."""

PROTOCOL = 1
"""Increases when scores change their meaning, which invalidates earlier caches."""

_TENSORS = tuple(field.name for field in fields(WindowScores) if field.name != "window")


@dataclass(frozen=True)
class DenseScores:
    """The dense model's scores of one text."""

    text: EvaluationText
    windows: Sequence[WindowScores]
    from_cache: bool

    def perplexity(self) -> PerplexityResult:
        """Of the dense model."""
        found = Perplexity(self.text, of="dense", from_cache=self.from_cache)
        feed(self.windows, found)
        return found.result()


def dense_scores(
    texts: Iterable[EvaluationText],
    open_runner: Callable[[], Runner],
    *,
    model: Mapping[str, str],
    cache: TensorCache,
    progress: Progress,
) -> list[DenseScores]:
    """Scores of every text, from the cache where they are there; if all are, no runner is opened.

    `model` is whatever decides its numbers: hashes of weights and config, dtype, versions, kind of device.

    Raises: CompressError as `score` does.
    """
    found = []
    with ExitStack() as opened:
        runner: Runner | None = None
        for text in texts:
            key = _key(text, model)
            kept = cache.get(key)
            if kept is None:
                runner = runner or opened.enter_context(open_runner())
                scored = score(runner, text.windows, top=TOP, name=text.name)
                fresh = _joined(watched(scored, text, f"dense scores on {text.name}", progress))
                # mapped from the file they take no memory while the model is compressed
                mapped = cache.get(key) if cache.put(key, fresh) else None
                found.append(DenseScores(text, _split(mapped or fresh, text), False))
            else:
                progress.note(f"{text.name}: using cached scores of the dense model")
                found.append(DenseScores(text, _split(kept, text), True))
    return found


def against_dense(runner: Runner, dense: Sequence[DenseScores], progress: Progress) -> list[Measurement]:
    """Perplexity of the compressed model on the same texts, and how far its predictions are from the dense ones.

    Raises: CompressError as `score` does.
    """
    found: list[Measurement] = []
    for each in dense:
        own, compared = Perplexity(each.text, of="compressed"), AgainstDense(each.text, each.windows)
        scored = score(runner, each.text.windows, reference=each.windows, name=each.text.name)
        feed(watched(scored, each.text, f"perplexity on {each.text.name}", progress), own, compared)
        found += [own.result(), compared.result()]
    return found


def _key(text: EvaluationText, model: Mapping[str, str]) -> str:
    """The tokens identify text, tokenizer, window, BOS and number of windows."""
    tokens = hashlib.sha256()
    for window_W in text.windows:
        tokens.update(len(window_W).to_bytes(8, "little") + window_W.to(torch.int64).numpy().tobytes())
    facts = {**model, "windows": tokens.hexdigest(), "top": TOP, "protocol": PROTOCOL}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _joined(windows: Iterable[WindowScores]) -> dict[str, Tensor]:
    """Every field over all windows, one after the other."""
    parts = list(windows)
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}


def _split(tensors: Mapping[str, Tensor], text: EvaluationText) -> list[WindowScores]:
    """The inverse."""
    lengths = [len(window) - 1 for window in text.windows]
    split = {name: torch.split(tensor, lengths) for name, tensor in tensors.items()}
    return [WindowScores(index, **{name: split[name][index] for name in _TENSORS}) for index in range(len(lengths))]
