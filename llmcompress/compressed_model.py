"""The result of `compress`: the compressed model, its report, and methods to evaluate, save and upload it."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.calibration.offloading import InMemory
from llmcompress.calibration.tokens import max_positions
from llmcompress.errors import CompressError, ExitCode, did_you_mean
from llmcompress.evaluation.beside import EvaluatedModel, evaluation_of
from llmcompress.evaluation.environment import numeric_versions
from llmcompress.evaluation.footprint import Footprint
from llmcompress.evaluation.footprint import footprint as footprint_of_folder
from llmcompress.evaluation.measuring import TaskLike, as_tasks
from llmcompress.evaluation.metrics.base import Subject
from llmcompress.exporters.save import save_model
from llmcompress.exporting import Exportable, export, exporter_called
from llmcompress.hub_upload import push
from llmcompress.loading.borrowed import borrowed, is_loaded_quantized
from llmcompress.loading.in_memory import LiveModel, identity_in_memory, required_tokenizer, whole_model
from llmcompress.loading.load import ModelAndTokenizer, load
from llmcompress.loading.source import IN_MEMORY
from llmcompress.modules.base import CompressedModule
from llmcompress.progress import ProgressLike, as_progress
from llmcompress.publishing.commits import Pushed
from llmcompress.publishing.destinations import HubRepository, as_repository
from llmcompress.recipe import Recipe, Save
from llmcompress.records.evaluation import Evaluation
from llmcompress.records.report import Report
from llmcompress.runners.torch_runner import TorchRunner
from llmcompress.saving import Result, fill_folder, publish_result
from llmcompress.storage.folder import check_output


@dataclass(frozen=True, repr=False)
class CompressedModel:
    """A compressed model with its tokenizer, recipe and report.

    `.model` is an ordinary transformers model: call it, generate with it, move it. A model passed in memory was changed
    in place and has its original device and dtype (or it is a new object, if blocks or the residual stream got
    smaller); one loaded from files is on the CPU in float32.
    """

    _result: Result
    device: torch.device
    """Where `evaluate` computes."""
    folder: Path | None = None
    """Where it was saved by `compress`; None: it is in memory alone."""
    offloaded: bool = False
    """Whether its weights never were in memory as a whole: `.model` then reads them from `folder`."""
    published: tuple[Pushed, ...] = ()
    """Where the recipe pushed it to."""

    @cached_property
    def model(self) -> PreTrainedModel:
        """The compressed model."""
        return load(self._saved()).model if self.offloaded else self._result.model

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype to which its weights and scales are rounded."""
        return self._result.storage_dtype

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._result.tokenizer

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe. If it names `memory:…`, model or calibration data must be passed again to repeat the
        run.
        """
        return self._result.recipe

    @property
    def report(self) -> Report:
        """What was done to every linear, and what was measured before and after."""
        return self._result.report

    def evaluate(
        self, tasks: TaskLike | Sequence[TaskLike] | None = None, *, progress: ProgressLike = None
    ) -> Evaluation:
        """Perplexity on texts such as `"wikitext2:test"` or `"my.txt"`, or any other metric; None: those of the recipe.

        Computed in float32, like the report's numbers.

        Raises: CompressError if a text cannot be read.
        """
        chosen = as_tasks(self.recipe.evaluate if tasks is None else tasks)
        with evaluated_in_memory(self.model, self.tokenizer, self.device) as evaluated:
            return evaluation_of(evaluated, chosen, as_progress(progress), baseline=None)

    def generate(self, prompt: str | Sequence[dict[str, str]], *, max_new_tokens: int = 64) -> str:
        """The greedy continuation of a text, or the answer to chat messages, up to the end-of-text token.

        Computed where and as `.model` is. For sampling and batches use `.model.generate`.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            text = self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        stop = [] if end is None else [end]
        with TorchRunner(self.model) as runner:
            (new,) = runner.generate([ids], max_new_tokens=max_new_tokens, stop=stop)
        return str(self.tokenizer.decode(new, skip_special_tokens=True))

    def footprint(self) -> Footprint:
        """Parameters and bytes, on disk and in theory, of the folder that `save` writes (or wrote)."""
        if self.folder is not None:
            return footprint_of_folder(self.folder)
        with tempfile.TemporaryDirectory(prefix="llmcompress-") as scratch, self._lent() as result:
            fill_folder(result, Path(scratch))
            return footprint_of_folder(Path(scratch)).model_copy(update={"model": self.report.model})

    def save(self, folder: str | Path, *, format: str | None = None, overwrite: bool = False) -> Path:
        """Save it as a Hugging Face folder with tokenizer, recipe and report; `format` as `save.format` in recipes.

        The folder appears complete or not at all.

        Raises: CompressError if it cannot be written, exists without `overwrite`, or the format cannot represent the
        model.
        """
        recipe = self.recipe
        if format is not None:
            save = {**recipe.save.model_dump(), "format": _known_format(format)}
            recipe = recipe.model_copy(update={"save": Save.model_validate(save)})
        check_output(Path(folder), overwrite=overwrite)
        with self._lent() as result:
            publish_result(replace(result, recipe=recipe), Path(folder), overwrite=overwrite)
        return Path(folder)

    def export(
        self, to: str, folder: str | Path, *, options: Mapping[str, Any] | None = None, overwrite: bool = False
    ) -> Path:
        """Write it for one target (`llmcompress targets`), read it back and compare; `options` are the target's own.

        Raises: CompressError naming the targets that hold it, if this one does not.
        """
        exporter = exporter_called(to, options)
        check_output(Path(folder), overwrite=overwrite)
        with self._lent() as result:
            export(result.exportable, exporter, Path(folder), overwrite=overwrite)
        return Path(folder)

    def push(
        self,
        repository: str | HubRepository,
        *,
        private: bool | None = None,
        also: Sequence[str | Path] = (),
        report: str | Path | None = None,
        progress: ProgressLike = None,
    ) -> Pushed:
        """Publish it with a model card as a repository on the Hub, by the login of `hf auth login` or HF_TOKEN.

        `also`: folders of exports beside it; `report`: an evaluation for the card. A `HubRepository` says more.

        Raises: CompressError (exit code 5) for the Hub or the network; (6) for a gate not kept; (3) for secrets.
        """
        wanted = as_repository(repository, private=private)
        if self.folder is not None:
            return push([self.folder, *also], wanted, report=report, progress=progress)
        with tempfile.TemporaryDirectory(prefix="llmcompress-") as scratch:
            folder = Path(scratch) / wanted.name
            with self._lent() as result:
                publish_result(result, folder, overwrite=False)
            return push([folder, *also], wanted, report=report, progress=progress)

    @property
    def exportable(self) -> Exportable:
        """What `llmcompress.export` writes; refused where weights were offloaded: they are in the folder alone."""
        with self._lent() as result:
            return result.exportable

    def __repr__(self) -> str:
        return f"CompressedModel({', '.join(f'{name}: {text}' for name, text in self._summary())})"

    def _repr_html_(self) -> str:
        """For notebooks: one small table."""
        rows = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in self._summary())
        return f"<table>{rows}</table>"

    def _summary(self) -> list[tuple[str, str]]:
        report = self.report
        passes = " → ".join(next(iter(each)) for each in self.recipe.to_dict()["passes"])
        found = [("model", report.model), ("passes", passes)]
        if report.bytes_dense and report.bytes_compressed:
            ratio = report.bytes_compressed / report.bytes_dense
            sizes = f"{report.bytes_dense / 1e6:.1f} → {report.bytes_compressed / 1e6:.1f} MB"
            found.append(("weight files", f"{sizes} ({ratio:.0%})"))
        for each in report.quality:
            before, after = each.dense.perplexity, each.compressed.perplexity
            what = f"perplexity on {each.dense.text}, window {each.dense.window}{', BOS' if each.dense.bos else ''}"
            found.append((what, f"{before:.3f} → {after:.3f} (×{each.ratio:.3f})"))
        return found

    def _saved(self) -> Path:
        assert self.folder is not None, "weights are offloaded only where there is a folder"
        return self.folder

    def _lent(self) -> AbstractContextManager[Result]:
        """The result with its model in float32 on the CPU, for as long as it is written."""
        if self.offloaded:
            raise CompressError(
                "memory.needed",
                "the model was compressed with weight offloading: it is in the saved folder, not in memory",
                where=str(self.folder),
                fix="copy that folder, or compress again with another `save.format`",
                saved="the folder",
                exit_code=ExitCode.USAGE,
            )
        return _lent(self._result)


ModelLike = str | Path | nn.Module | CompressedModel | ModelAndTokenizer
"""A Hub id, a folder or `builtin:NAME`; a model in memory; what `compress` or `load` gave back."""


def in_memory(model: object) -> PreTrainedModel | None:
    """The model, if it is in memory.

    Raises: CompressError for what can be no model.
    """
    if isinstance(model, CompressedModel | ModelAndTokenizer):
        return model.model
    if isinstance(model, nn.Module):
        return whole_model(model)
    return None


def footprint(model: ModelLike) -> Footprint:
    """Parameters and bytes of a model; for one in memory, those of the folder that it would be saved to.

    Raises: CompressError if there is no such model, or its format cannot be read.
    """
    if isinstance(model, CompressedModel):
        return model.footprint()
    live = in_memory(model)
    if live is None:
        return footprint_of_folder(str(model))
    with tempfile.TemporaryDirectory(prefix="llmcompress-") as scratch:
        storage_dtype = live.dtype
        with borrowed(live):
            save_model(live, Path(scratch), "auto", storage_dtype=storage_dtype)
        return footprint_of_folder(scratch).model_copy(update={"model": f"{IN_MEMORY}{type(live).__name__}"})


def runner_of(model: PreTrainedModel, device: torch.device) -> TorchRunner:
    """A borrowed model on that device; one that transformers loaded with codes stays where it is."""
    return (
        TorchRunner(model) if is_loaded_quantized(model) else TorchRunner(model, weights_at=InMemory(), device=device)
    )


@contextmanager
def evaluated_in_memory(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, device: torch.device
) -> Iterator[EvaluatedModel]:
    """A model in memory, to be evaluated; it is where and as it was afterwards.

    Raises: CompressError without a tokenizer.
    """
    reader, config = required_tokenizer(tokenizer), model.config
    about = {**numeric_versions(), "runner": "torch", "dtype": "float32", "device": device.type}
    with borrowed(model):
        yield EvaluatedModel(
            f"{IN_MEMORY}{type(model).__name__}",
            Subject(reader, max_positions(config), config.get_text_config().vocab_size),
            {**identity_in_memory(model), **about},
            "torch",
            lambda: runner_of(model, device),
        )


def tokenizer_beside(model: object) -> PreTrainedTokenizerBase | None:
    """What came with it."""
    return model.tokenizer if isinstance(model, CompressedModel | ModelAndTokenizer) else None


def live_model(model: ModelLike | None, tokenizer: PreTrainedTokenizerBase | None) -> LiveModel | None:
    """A model in memory, ready to be compressed; None if the model is loaded from files.

    Raises: CompressError if it cannot be compressed, or there is no tokenizer.
    """
    found = in_memory(model)
    if found is not None:
        return LiveModel.of(found, tokenizer or tokenizer_beside(model))
    if tokenizer is not None:
        raise CompressError(
            "model.own-tokenizer",
            "a tokenizer was given, but the model is loaded from files that include one",
            fix="remove `tokenizer`, or give the model in memory too",
            exit_code=ExitCode.USAGE,
        )
    if model is not None and not isinstance(model, str | Path):
        raise CompressError(
            "model.kind",
            f"{type(model).__name__} is not a model",
            fix="give a Hub id, a folder, or what AutoModelForCausalLM.from_pretrained returns",
            exit_code=ExitCode.USAGE,
        )
    return None


def is_dense(model: nn.Module) -> bool:
    """Whether nothing of ours stands in it."""
    return not any(isinstance(module, CompressedModule) for module in model.modules())


def named_models(models: ModelLike | Sequence[ModelLike]) -> list[tuple[str, str | PreTrainedModel]]:
    """One or several, with names for a table; models in memory are called by their class and place in the list."""
    one = isinstance(models, str | Path | nn.Module | CompressedModel | ModelAndTokenizer)
    several = cast(Sequence[ModelLike], [models] if one else models)
    found: list[tuple[str, str | PreTrainedModel]] = []
    for number, each in enumerate(several, start=1):
        live = in_memory(each)
        found.append((str(each), str(each)) if live is None else (f"{number}: {type(live).__name__}", live))
    return found


@contextmanager
def _lent(result: Result) -> Iterator[Result]:
    with borrowed(result.model):
        yield result


def _known_format(name: str) -> str:
    known = get_args(Save.model_fields["format"].annotation)
    if name not in known:
        raise CompressError(
            "save.unknown-format",
            f"unknown format {name!r}",
            fix=did_you_mean(name, known),
            exit_code=ExitCode.USAGE,
        )
    return name
