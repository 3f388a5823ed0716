"""Several tables cost one sweep and one stream; nothing is measured twice while the model stays what it is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.calibration.measurement_cache import MeasurementCache
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.units import unit_groups
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics import loss
from llmcompress.numerics.statistics import Gram
from llmcompress.passes.pruning.scores.base import SCORES
from llmcompress.passes.pruning.sparse_counts import SparsityEstimator
from llmcompress.passes.quantization.sensitivity import RelativeOutput, WeightedOutput
from llmcompress.sensitivity import gradients
from llmcompress.sensitivity.gradients import OutputSquares, UnitMasks, WeightGradients, squared_gradients, sweep
from llmcompress.sensitivity.loss_estimators import LossEstimator, cached_table, dense_stream, measure_losses
from llmcompress.sensitivity.table import LossTable, Row
from tests.passes.decomposition.factored import block_pass, map_of, whole_model
from tests.sensitivity.kept import KeptMeasurements

FAMILY = "llama_gqa"


@contextmanager
def forwards(whole: WholeModel) -> Iterator[dict[str, int]]:
    """How often the model and its first block run."""
    counts = {"model": 0, "block": 0}
    block = whole.model.get_submodule(whole.map.blocks[0].name)

    def counted(what: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counts[what] += 1

        return count

    hooks = [whole.model.lm_head.register_forward_hook(counted("model"))]
    hooks.append(block.register_forward_hook(counted("block")))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def estimators(whole: WholeModel) -> list[LossEstimator]:
    names = [site.name for site in whole.sites()]
    schemes = {name: [named_scheme("int2_g32"), named_scheme("int4_g32")] for name in names}
    wanda = block_pass("wanda", allocation="loss")
    groups = unit_groups(whole.map)
    return [
        WeightedOutput(schemes),
        RelativeOutput(schemes),
        SparsityEstimator(wanda, frozenset(names), (0.4, 0.6)),  # type: ignore[arg-type]
        SCORES["taylor_first"](groups),
        SCORES["activation"](groups),
    ]


def same(first: LossTable, second: LossTable) -> bool:
    ours, theirs = first.tensors(), second.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_tables_filled_together_are_those_filled_alone_and_cost_one_sweep() -> None:
    whole = whole_model(FAMILY)
    alone = [measure_losses(whole, [each])[0] for each in estimators(whole)]
    batches = len(list(whole.batches()))
    with forwards(whole) as counts:
        together = measure_losses(whole, estimators(whole))
    assert all(map(same, together, alone))
    assert counts["model"] == batches


def test_what_is_known_of_a_state_is_not_measured_again() -> None:
    whole = whole_model(FAMILY)
    whole = whole.within(whole.context.at("dense"))
    first = measure_losses(whole, estimators(whole)[:3])
    with forwards(whole) as counts:
        again = measure_losses(whole, estimators(whole)[:3])
    assert counts == {"model": 0, "block": 0}
    assert all(map(same, again, first))


@pytest.mark.parametrize("change", ["state", "windows", "unknown state"])
def test_another_state_or_other_windows_are_measured_anew(change: str) -> None:
    whole = whole_model(FAMILY)
    whole = whole.within(whole.context.at("dense"))
    names = [site.name for site in whole.sites()]
    first = squared_gradients(whole, names)
    contexts = {
        "state": whole.context.at("pruned"),
        "windows": whole.context.first_windows(2),
        "unknown state": whole.context.changing(),
    }
    weight = whole.sites()[-1]
    weight.write(weight.weight_OI * 2)
    other = squared_gradients(whole.within(contexts[change]), names)
    assert not torch.equal(first[names[0]], other[names[0]])


def test_the_store_holds_no_more_than_it_may() -> None:
    whole = whole_model(FAMILY)
    store = MeasurementCache(most_bytes=10_000)
    cached = store.of("dense", whole.context.windows_NT, "routed")
    assert cached is not None
    for index in range(10):
        cached.put(torch.zeros(1000), str(index))
    assert store.held_bytes <= 10_000
    assert [cached.find(Tensor, str(index)) is not None for index in range(3)] == [True, True, False]


def test_statistics_of_different_sites_reach_those_that_asked() -> None:
    whole = whole_model(FAMILY)
    names = [site.name for site in whole.sites()]
    some = frozenset(name for name in names if name.endswith("down_proj"))
    for block in dense_stream(whole, [(some, (Gram,))]):
        for site in block.sites:
            assert bool(site.statistics()) == (site.name in some)


def test_listeners_of_all_kinds_hear_one_sweep_as_they_hear_their_own() -> None:
    whole = whole_model(FAMILY)
    names = [site.name for site in whole.sites()]
    groups = unit_groups(map_of(FAMILY))

    def made() -> tuple[OutputSquares, WeightGradients, UnitMasks]:
        return OutputSquares(names), WeightGradients(names), UnitMasks(groups)

    joint, single = made(), made()
    sweep(whole, joint)
    for each in single:
        sweep(whole, [each])
    for name in names:
        assert torch.equal(joint[0].sums[name], single[0].sums[name])
        assert torch.equal(joint[1].sums[name], single[1].sums[name])
    for index in range(len(groups)):
        assert torch.equal(joint[2].stacked(index), single[2].stacked(index))
    assert not any(parameter.grad is not None for parameter in whole.model.parameters())


def by_the_book(whole: WholeModel, names: Sequence[str]) -> dict[str, Tensor]:
    """Gradients of the loss, summed over windows, of plain forward passes."""
    model, ids_NT = whole.model, whole.context.windows_NT
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for ids_T in ids_NT:
        logits_TV = model(ids_T[None]).logits[0]
        functional.cross_entropy(logits_TV[:-1], ids_T[1:]).backward()
    found = {name: model.get_submodule(name).weight.grad.clone() for name in names}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("logits_bytes", [loss.LOGITS_BYTES, 4])
def test_gradients_are_those_of_plain_forwards_however_few_logits_there_are(
    monkeypatch: pytest.MonkeyPatch, logits_bytes: int
) -> None:
    whole = whole_model(FAMILY)
    whole = whole.within(replace(whole.context, batch=4))
    names = [site.name for site in whole.sites()]
    expected = by_the_book(whole, names)
    monkeypatch.setattr(loss, "LOGITS_BYTES", logits_bytes)
    monkeypatch.setattr(gradients, "_FEWEST_ROWS", 7)
    observer = WeightGradients(names)
    sweep(whole, [observer])
    for name in names:
        torch.testing.assert_close(observer.sums[name], expected[name], rtol=1e-4, atol=1e-6)


def test_no_gradient_of_a_weight_waits_for_the_others() -> None:
    alive: list[int] = []

    class Looking(WeightGradients):
        def _take(self, name: str, weight: Tensor) -> None:
            super()._take(name, weight)
            alive.append(sum(parameter.grad is not None for parameter in whole.model.parameters()))

    whole = whole_model(FAMILY)
    names = [site.name for site in whole.sites()]
    sweep(whole, [Looking(names)])
    assert len(alive) == len(names) * len(list(whole.batches()))
    assert set(alive) == {1}


def test_only_the_states_between_blocks_are_kept_for_the_backward_pass() -> None:
    whole = whole_model(FAMILY)
    runs: list[bool] = []
    for block in whole.map.blocks:
        whole.model.get_submodule(block.name).self_attn.register_forward_hook(lambda *_: runs.append(True))
    sweep(whole, [OutputSquares([site.name for site in whole.sites()])])
    assert len(runs) == 2 * len(whole.map.blocks) * len(list(whole.batches()))


def test_a_kept_table_is_not_made_again() -> None:
    whole = whole_model(FAMILY)
    whole = whole.within(replace(whole.context.at("00"), keep=KeptMeasurements()))  # type: ignore[arg-type]
    made: Sequence[Row] = (Row.of("a", ["x"], [1.0], [8], [(1, 1)]),)
    first = cached_table(whole, "losses", lambda: LossTable(tuple(made)))

    def never() -> LossTable:
        raise AssertionError("measured again")

    assert same(cached_table(whole, "losses", never), first)
