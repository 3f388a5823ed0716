"""The dense model after a choice of `before`: made once, kept in the store, read again by every process."""

from __future__ import annotations

import copy
from dataclasses import replace

from llmcompress.calibration.whole import WholeModel
from llmcompress.model.probe import map_model
from llmcompress.model.snapshot import about_model, model_again
from llmcompress.passes.apply import apply_passes
from llmcompress.plan_search.levels.store import LevelStore
from llmcompress.plan_search.plan_space import PlanSpace


def model_after(whole: WholeModel, space: PlanSpace, store: LevelStore, before: str) -> WholeModel:
    """The model itself where the choice has no passes; else another one, which is in the store or will be."""
    passes = space.space.before[before]
    if not passes:
        return whole
    key = f"{list(space.space.before).index(before):02d}-model"
    if not store.is_finished(key):
        context = replace(whole.context, keep=None, state=None)
        made = apply_passes(copy.deepcopy(whole.model), whole.map, passes, context).model
        store.save(key, made.state_dict(), about_model(made))
    file = store.file(key)
    model = model_again(whole.model, file.tensors(), file.about)
    return WholeModel(model, map_model(model), whole.context)
