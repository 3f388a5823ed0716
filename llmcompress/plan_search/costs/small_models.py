"""Models of a config with random weights: small ones, whose differences are measured, and those that plans describe.

What a block takes is the difference of two models that differ in depth; what a linear takes in another form is that of
two that differ in that form.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.model.probe import map_model
from llmcompress.model.random_weights import materialise
from llmcompress.model.site import LinearSite
from llmcompress.model.skeleton import find_blocks
from llmcompress.modules.low_rank import LowRankLinear
from llmcompress.passes.apply import apply_passes
from llmcompress.plan_search.costs.bench import Unmeasurable, random_linear
from llmcompress.plan_search.costs.forms import DENSE, Forms, Matrix
from llmcompress.plan_search.plan_recipe import recipe_of
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.space import UNTOUCHED, Passes

VOCABULARY = 272
"""Rows of the embedding: every token of `byte_tokenizer` has one."""
_WINDOWS, _TOKENS = 2, 8
"""Of random text, on which a body is cut out: which channels go does not matter."""
_PAIRS = ("pad_token_id", "bos_token_id", "eos_token_id")


def small_model(
    config: PretrainedConfig, blocks: int, passes: Passes, *, vocabulary: int = VOCABULARY
) -> PreTrainedModel:
    """With so many blocks, to all of which these passes are applied, such as those of a body."""
    model = _model(_shortened(config, blocks, vocabulary))
    if passes:
        model = apply_passes(model, map_model(model), passes, RunContext(random_windows())).model
    return model.eval()


def with_matrix(model: PreTrainedModel, matrix: Matrix) -> PreTrainedModel:
    """The same model, in place, where every linear of that shape has that form."""
    for site in _sites(model):
        if (site.info.outputs, site.info.inputs) == (matrix.outputs, matrix.inputs):
            site.replace(random_module((matrix,), site.bias_O))
    return model


def plan_model(config: PretrainedConfig, space: PlanSpace, forms: Forms, plan: Plan) -> PreTrainedModel:
    """The model of a plan as large as it would be, for measuring it from end to end.

    What is done to all of it before or after is left out, but for codes in the embedding and the head.

    Raises: Unmeasurable for forms that are no codes and no two factors.
    """
    choices = space.space.model_copy(update={"sites": {DENSE: ()}, "before": {UNTOUCHED: ()}, "after": {UNTOUCHED: ()}})
    plain = PlanSpace(choices, space.model_map)
    shapes = tuple(choice if unit.kind == "body" else 0 for unit, choice in zip(space.units, plan, strict=True))
    passes = [] if shapes == plain.uniform(DENSE) else list(recipe_of(plain, shapes, {}).passes)
    after = space.space.after[space.units[-1].options[plan[-1]]]
    passes += [each for each in after if each.rounds_embedding()]
    model = _model(copy.deepcopy(config))
    if passes:
        model = apply_passes(model, map_model(model), passes, RunContext(random_windows())).model
    kept = [index for index in range(len(space.model_map.blocks)) if index not in space.dropped(plan)]
    blocks = find_blocks(model)
    for unit, choice in zip(space.units, plan, strict=True):
        if unit.body is None or space.is_dropped(plan, unit.body):
            continue
        body = space.units[unit.body].options[plan[unit.body]]
        for form in forms.of(unit, body, unit.options[choice]):
            index = next(info.index for info in space.model_map.blocks if form.name.startswith(f"{info.name}."))
            name, block = blocks[kept.index(index)]
            site = LinearSite(f"{name}.{form.site.name}", form.site, block, torch.float32)
            if form.matrices != (Matrix(form.site.outputs, form.site.inputs),):
                site.replace(random_module(form.matrices, site.bias_O))
    return model.eval()


def random_module(matrices: Sequence[Matrix], bias_O: Tensor | None) -> nn.Module:
    """What stands in a model for a linear of that form.

    Raises: Unmeasurable for more than two matrices, or two that are not dense.
    """
    here = torch.device("cpu")
    if len(matrices) == 1:
        made = random_linear(matrices[0], torch.float32, here)
        made.bias = None if bias_O is None else nn.Parameter(bias_O.detach(), requires_grad=False)
        return made
    if len(matrices) == 2 and all(each.form == DENSE for each in matrices):
        right, left = (random_linear(each, torch.float32, here).weight for each in matrices)
        return LowRankLinear.from_factors(left, right, bias_O)
    raise Unmeasurable(f"no model is built of {len(matrices)} matrices in the place of one")


def _sites(model: PreTrainedModel) -> list[LinearSite]:
    modules = dict(find_blocks(model))
    return [
        LinearSite(info.full(site.name), site, modules[info.name], torch.float32)
        for info in map_model(model).blocks
        for site in info.structure.sites
    ]


def random_windows() -> Tensor:
    """Token ids of no meaning, for passes that must see some."""
    return torch.randint(VOCABULARY, (_WINDOWS, _TOKENS), generator=torch.Generator().manual_seed(0))


def _shortened(config: PretrainedConfig, blocks: int, vocabulary: int) -> PretrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    deep = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == deep:
            setattr(text, name, type(value)(value[:blocks]))
    text.num_hidden_layers, text.vocab_size = blocks, vocabulary
    for name in _PAIRS:
        if isinstance(value := getattr(text, name, None), int) and value >= vocabulary:
            setattr(text, name, None)
    return config


def _model(config: PretrainedConfig) -> PreTrainedModel:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    materialise(model)
    model.tie_weights()
    return model
