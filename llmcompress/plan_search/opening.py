"""A model and a search file → what a search needs: space, text, exact costs; no weight is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.devices import usable_device
from llmcompress.calibration.tokens import max_positions, refuse_beyond_embedding
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.exporters.loader import loader_of
from llmcompress.known_model import KnownModel
from llmcompress.loading.identity import identity_of_folder
from llmcompress.loading.load import Loaded, load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.loading.teachers import TeacherFiles
from llmcompress.model.experts import unfuse_experts
from llmcompress.model.probe import map_model
from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.costs.file_bytes import bytes_of, with_settled_format
from llmcompress.plan_search.costs.forms import Forms
from llmcompress.plan_search.costs.latency_table import LatencyTable
from llmcompress.plan_search.costs.measuring import measure_latency
from llmcompress.plan_search.costs.resources import energy_of, memory_of
from llmcompress.plan_search.costs.seconds import seconds_of
from llmcompress.plan_search.costs.small_runs import LatencySettings
from llmcompress.plan_search.costs.trying import forms_of
from llmcompress.plan_search.plan_recipe import recipe_of
from llmcompress.plan_search.plan_space import PlanSpace
from llmcompress.plan_search.settings import SearchSettings
from llmcompress.plan_search.space import Space
from llmcompress.planning import check_recipe, storage_dtype_of
from llmcompress.progress import Progress

TABLE = "latency.json"
"""In the folder of the study: what was measured for it."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model of a search, read and checked."""

    settings: SearchSettings
    loaded: Loaded
    known: KnownModel
    space: PlanSpace
    whole: WholeModel
    """Its context has the calibration windows."""
    judged_NT: Tensor
    """Windows that no pass measures, on which plans are judged."""
    recipe_settings: Mapping[str, Any]
    """Of every plan's recipe, with a format that holds all plans."""

    @property
    def judged_space(self) -> PlanSpace:
        """Whose candidates are judged: with short trainings where the settings say so; plans mean the same in it."""
        return self.settings.judge.space_of(self.space)

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of what decides what the model computes."""
        assert self.loaded.folder is not None
        return identity_of_folder(self.loaded.folder)


def open_subject(settings: SearchSettings, *, device: str, progress: Progress) -> Subject:
    """Read and map the model, check that every option fits it, and read the texts.

    Raises: CompressError for any fault of the model, the space or a text.
    """
    progress.stage("load", 1)
    source = find_source(str(settings.model), revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    loaded = load_for_compression(source, trust_remote_code=settings.trust_remote_code, progress=progress)
    unfuse_experts(loaded.model, loaded.weights)
    model_map = map_model(loaded.model)
    known = KnownModel(source.name, loaded.preflight, model_map, loader_of(loaded.model.config))
    space = PlanSpace(settings.space, model_map)
    check_options(space, known, settings)
    where = usable_device(device)
    torch.manual_seed(settings.seed)
    windows_NT, judged_NT = _texts(settings, loaded, progress)
    context = RunContext(
        windows_NT,
        device=where,
        storage_dtype=storage_dtype_of(settings.save, loaded.preflight),
        seed=settings.seed,
        **settings.calibration.of_blocks(where),
        progress=progress,
        teachers=TeacherFiles(settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code),
    )
    return Subject(
        settings=settings,
        loaded=loaded,
        known=known,
        space=space,
        whole=WholeModel(loaded.model, space.model_map, context),
        judged_NT=judged_NT,
        recipe_settings=with_settled_format(space, known, settings.recipe_settings()),
    )


def check_options(space: PlanSpace, known: KnownModel, settings: SearchSettings) -> None:
    """Every option by itself makes a recipe that fits the model.

    Raises: CompressError naming the option that does not.
    """
    plain = next(iter(space.space.sites))
    plans = {f"sites: {name}": space.uniform(name) for name, passes in space.space.sites.items() if passes}
    for kind, choices in (("body", space.space.bodies), ("before", space.space.before), ("after", space.space.after)):
        plans |= {f"{kind}: {name}": space.uniform(plain, **{kind: name}) for name, passes in choices.items() if passes}
    if not plans:
        raise CompressError(
            "search.nothing", "the space has no option that changes anything", fix="add options to `space.sites`",
            exit_code=ExitCode.USAGE,
        )  # fmt: skip
    for name, plan in plans.items():
        recipe = recipe_of(space, plan, settings.recipe_settings())
        try:
            check_recipe(recipe, space.model_map, known.loader)
        except CompressError as refused:
            refused.where = f"space ({name}), {refused.where}".rstrip(", ")
            raise


def costs_of(subject: Subject, folder: Path, *, progress: Progress) -> tuple[dict[str, Additive], dict[str, float]]:
    """What each choice adds on every axis of the search, and what the dense model costs.

    All but bytes come from the table that the settings name, or from one measured now and kept in the folder.

    Raises: CompressError for an axis that the table does not have.
    """
    settings, space, config = subject.settings, subject.space, subject.loaded.model.config
    forms = forms_of(space, config, storage_dtype=subject.whole.context.storage_dtype)
    found: dict[str, Additive] = {}
    dense: dict[str, float] = {}
    if "bytes" in settings.axes:
        found["bytes"] = bytes_of(space, subject.known, subject.recipe_settings, forms=forms)
        dense["bytes"] = float(subject.known.checked.bytes_weights)
    if set(settings.axes) - {"bytes"}:
        table = latency_table(subject, folder, forms, progress=progress)
        untouched = PlanSpace(Space(sites={"dense": ()}), space.model_map)
        of_all, of_dense = _measured(space, table, forms), _measured(untouched, table, Forms(untouched))
        for axis in settings.axes[settings.axes[0] == "bytes" :]:
            ours, whole = of_all[axis], of_dense[axis]
            if ours is None or whole is None:
                raise CompressError(
                    "search.axis",
                    f"the latency table of {table.runtime} on {table.device} has no {axis}: it could not be measured",
                    where="costs.axes, limits",
                    fix="measure a table where it can be, or leave that axis out",
                    exit_code=ExitCode.USAGE,
                )
            found[axis], dense[axis] = ours, whole.total(untouched, untouched.uniform("dense"))
    return found, dense


def _measured(space: PlanSpace, table: LatencyTable, forms: Forms) -> dict[str, Additive | None]:
    memory, energy = memory_of(space, table, forms=forms), energy_of(space, table, forms=forms)
    return {**seconds_of(space, table, forms=forms), "memory": memory, "energy": energy}


def latency_table(subject: Subject, folder: Path, forms: Forms, *, progress: Progress) -> LatencyTable:
    """The table that the settings name, or the one of this study, measured where it is not there yet.

    Raises: CompressError where a file is no table.
    """
    costs = subject.settings.costs
    file = folder / TABLE if costs.table is None else Path(costs.table)
    if costs.table is not None or file.is_file():
        return LatencyTable.read(file, runtime=costs.runtime)
    progress.stage("measure latency", 0)
    settings = LatencySettings(
        batch=costs.batch,
        context=costs.context,
        turns=costs.turns,
        threads=costs.threads,
        memory="memory" in subject.settings.axes,
        device=subject.whole.context.device.type,
    )
    config = subject.loaded.model.config
    table = measure_latency(subject.space, config, costs.runtime, settings=settings, forms=forms, progress=progress)
    table.write(file)
    return table


def _texts(settings: SearchSettings, loaded: Loaded, progress: Progress) -> tuple[Tensor, Tensor]:
    """Calibration windows, and windows to judge on, which come after those that recipes hold out.

    Raises: CompressError where no window is left to judge on.
    """
    tokens, other = max(settings.judge.stages), settings.judge.text
    guarded = settings.guard.windows
    limit, rows = max_positions(loaded.model.config), loaded.preflight.contents.embedding_rows
    calibration = settings.calibration
    length = min(calibration.tokens, limit or calibration.tokens)
    wanted = 0 if other is not None else max(1, tokens // length)
    data = calibration_windows(
        calibration,
        loaded.tokenizer,
        max_positions=limit,
        seed=settings.seed,
        progress=progress,
        given=loaded.model,
        held_out=guarded + wanted,
    )
    refuse_beyond_embedding(data.windows_NT, loaded.tokenizer, rows, where=f"calibration: {data.source}")
    if other is not None:
        length = min(other.tokens, limit or other.tokens)
        asked = other.model_copy(update={"samples": max(1, tokens // length)})
        judged = calibration_windows(
            asked, loaded.tokenizer, max_positions=limit, seed=settings.seed, progress=progress, given=loaded.model
        )
        refuse_beyond_embedding(judged.windows_NT, loaded.tokenizer, rows, where=f"judge: {judged.source}")
        return data.windows_NT, judged.windows_NT
    left_NT = data.windows_NT[:0] if data.held_out_NT is None else data.held_out_NT[guarded:]
    if len(left_NT) == 0:
        raise CompressError(
            "search.no-text",
            f"{data.source} has no text left to judge plans on: all of it is used for calibration",
            where="judge.text",
            fix="name another text in `judge.text`, or reduce `calibration.samples`",
        )
    return data.windows_NT, left_NT
