"""Whole models against the sum of their parts: is a latency table good enough for this space?"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import PretrainedConfig

from llmcompress.evaluation.device.pinning import pinned
from llmcompress.evaluation.device.speed import compare_speed, random_prompt
from llmcompress.plan_search.costs.bench import BENCHES
from llmcompress.plan_search.costs.forms import Forms
from llmcompress.plan_search.costs.latency_table import Check, LatencyTable, Seconds
from llmcompress.plan_search.costs.seconds import seconds_of
from llmcompress.plan_search.costs.small_models import plan_model
from llmcompress.plan_search.costs.small_runs import LatencySettings
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.progress import Progress, Silent


def check_sums(
    space: PlanSpace,
    config: PretrainedConfig,
    table: LatencyTable,
    plans: Sequence[tuple[str, Plan]],
    *,
    settings: LatencySettings | None = None,
    forms: Forms | None = None,
    progress: Progress | None = None,
) -> tuple[Check, ...]:
    """Measure models of these plans in turns, with random weights, as the table was measured.

    Raises: Unmeasurable for forms of which no model can be built.
    """
    chosen, progress, forms = settings or LatencySettings(), progress or Silent(), forms or Forms(space)
    bench = BENCHES[table.runtime](torch.device(chosen.device), chosen.dtype)
    sums = seconds_of(space, table, forms=forms)
    with pinned(table.threads), ExitStack() as stack:
        runners = {}
        for name, plan in plans:
            progress.substep(f"model of {name}")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmcompress-latency-")))
            runners[name] = stack.enter_context(bench.open(plan_model(config, space, forms, plan), folder))
        prompt_BT = random_prompt(space.model_map.vocabulary, batch=table.batch, tokens=table.context)
        prompts = dict.fromkeys(runners, prompt_BT)
        speeds = compare_speed(runners, prompts, new_tokens=chosen.new_tokens, repeats=chosen.turns, clock=table.clock)
    tokens = table.batch * table.context
    return tuple(
        Check(
            model=name,
            summed=Seconds(
                prefill=tokens * sums["prefill"].total(space, plan),
                decode=table.batch * sums["decode"].total(space, plan),
            ),
            measured=Seconds(
                prefill=tokens / speeds[name].prefill.median, decode=table.batch / speeds[name].decode.median
            ),
            spread=max(speeds[name].prefill.spread, speeds[name].decode.spread),
        )
        for name, plan in plans
    )
