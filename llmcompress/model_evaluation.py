"""`evaluate`: any model, dense or compressed, in any runtime, alone or beside its dense model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from llmcompress.calibration.devices import usable_device
from llmcompress.calibration.tokens import max_positions
from llmcompress.compressed_model import CompressedModel, ModelLike, evaluated_in_memory, in_memory, tokenizer_beside
from llmcompress.evaluation.beside import EvaluatedModel
from llmcompress.evaluation.beside import evaluations as stepwise
from llmcompress.evaluation.device.cost import Candidate, CostSettings, measure_costs
from llmcompress.evaluation.environment import numeric_versions
from llmcompress.evaluation.footprint import bytes_on_disk
from llmcompress.evaluation.kl_base import save_kl_base
from llmcompress.evaluation.measuring import TaskLike, as_tasks
from llmcompress.evaluation.metrics.base import Subject
from llmcompress.evaluation.settings.cost import CostRequest, cost_request
from llmcompress.evaluation.settings.perplexity import BUNDLED_TEXT, PerplexityTask
from llmcompress.evaluation.texts import evaluation_text
from llmcompress.loading.config import read_config
from llmcompress.loading.identity import identity_of_files, identity_of_folder
from llmcompress.loading.source import find_source
from llmcompress.loading.tokenizer import read_tokenizer
from llmcompress.progress import ProgressLike, as_progress
from llmcompress.records.evaluation import Comparison, Compression, Evaluation
from llmcompress.records.measurements import Measurement, Which
from llmcompress.runners.base import RUNNERS
from llmcompress.saving import saved_compression


def evaluate(
    model: ModelLike,
    tasks: TaskLike | Sequence[TaskLike] = BUNDLED_TEXT,
    *,
    baseline: ModelLike | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    runner: str = "torch",
    device: str = "auto",
    progress: ProgressLike = None,
) -> Evaluation:
    """Measure a dense or compressed model on everything in `tasks` (the bundled text), run by any runtime.

    With `baseline`, the dense model, also how far predictions and answers moved, paired item by item; torch runs it.
    What a model showed is cached, so the same call goes on after whatever stopped it, and nothing is computed twice. A
    model in memory needs its `tokenizer`, is run by torch in float32, and is then where and as it was.

    Raises: CompressError when a model or a text cannot be read, there is no such runtime, or the two models read the
    texts as different tokens.
    """
    stages = evaluations(
        model, tasks, baseline=baseline, tokenizer=tokenizer, runner=runner, device=device, progress=progress
    )
    *_, last = stages
    return last


def evaluations(
    model: ModelLike,
    tasks: TaskLike | Sequence[TaskLike] = BUNDLED_TEXT,
    *,
    baseline: ModelLike | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    runner: str = "torch",
    device: str = "auto",
    progress: ProgressLike = None,
) -> Iterator[Evaluation]:
    """The same step by step: what is found so far, after every metric; the last one has everything.

    Raises: CompressError like `evaluate`.
    """
    where, told, settings = usable_device(device), as_progress(progress), as_tasks(tasks)
    cost = cost_request(settings)
    with _opened(model, tokenizer, runner, where) as ours, ExitStack() as stack:
        theirs = None if baseline is None else stack.enter_context(_opened(baseline, tokenizer, "torch", where))
        found: Evaluation | None = None
        for found in stepwise(ours, settings, told, baseline=theirs):
            yield found if cost is None else found.model_copy(update={"unfinished": (*found.unfinished, "cost")})
    if cost is not None and found is not None:
        told.stage("cost on this device", 0)
        yield found.with_measurements(_costs(cost, model, baseline, runner=runner, device=where))


def _costs(
    cost: CostRequest, model: ModelLike, baseline: ModelLike | None, *, runner: str, device: torch.device
) -> list[Measurement]:
    """Of both models in turns, each in its own runtime."""
    settings = CostSettings(
        batches=cost.batches, contexts=cost.contexts, new_tokens=cost.new_tokens, repeats=cost.repeats, skip=cost.skip
    )
    candidates: dict[str, Candidate] = {}
    if baseline is not None:
        candidates["dense"] = Candidate(in_memory(baseline) or str(baseline), of="dense")
    of: Which = "model" if baseline is None else "compressed"
    candidates[of] = Candidate(in_memory(model) or str(model), runner, of=of)
    table = measure_costs(candidates, device=device, settings=settings)
    return [*table.rows, *table.limits]


def compare(
    base: ModelLike,
    models: Sequence[ModelLike],
    tasks: TaskLike | Sequence[TaskLike] = BUNDLED_TEXT,
    *,
    runner: str = "torch",
    device: str = "auto",
    progress: ProgressLike = None,
) -> Comparison:
    """Every model against the same dense one, which is run once.

    Raises: CompressError like `evaluate`.
    """
    found = [evaluate(each, tasks, baseline=base, runner=runner, device=device, progress=progress) for each in models]
    return Comparison(base=str(found[0].baseline), evaluations=tuple(found))


def write_kl_base(
    model: ModelLike,
    path: Path,
    text: PerplexityTask,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    runner: str = "torch",
    device: str = "auto",
    progress: ProgressLike = None,
) -> None:
    """Write a model's log-probabilities on a text as a KL base file of llama-perplexity.

    Such a file is a text of `evaluate`, with the scores of the dense model in it.

    Raises: CompressError like `evaluate`, and for a text that is not read by the protocol `llama-cpp`.
    """
    with _opened(model, tokenizer, runner, usable_device(device)) as opened:
        read = evaluation_text(text, opened.subject.tokenizer, opened.subject.max_positions)
        with opened.open_runner() as running:
            save_kl_base(path, running, read, as_progress(progress))


@contextmanager
def _opened(
    model: ModelLike, tokenizer: PreTrainedTokenizerBase | None, runner: str, device: torch.device
) -> Iterator[EvaluatedModel]:
    """A model in memory is borrowed for as long as this lasts; one in files is loaded when it must run."""
    live = in_memory(model)
    if live is not None:
        with evaluated_in_memory(live, tokenizer or tokenizer_beside(model), device) as evaluated:
            yield replace(evaluated, compression=_made_in_memory(model))
        return
    kind, source = RUNNERS[runner], find_source(str(model), as_it_is=runner != "torch")
    config, _ = read_config(source.folder, may_be_quantized=True)
    identity = identity_of_folder if runner == "torch" else identity_of_files
    yield EvaluatedModel(
        str(model),
        Subject(read_tokenizer(source.folder, config), max_positions(config), config.get_text_config().vocab_size),
        {**identity(source.folder), **numeric_versions(), "runner": runner, "dtype": "float32", "device": device.type},
        runner,
        lambda: kind.open(str(model), device=device, dtype=torch.float32),
        bytes_on_disk(source.gguf or source.folder) or None,
        saved_compression(source.gguf.parent if source.gguf else source.folder),
    )


def _made_in_memory(model: ModelLike) -> Compression | None:
    return model.report.compression(model.recipe.to_yaml()) if isinstance(model, CompressedModel) else None
