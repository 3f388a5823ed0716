"""rigl, lottery_ticket, recover and random: zeros are counted at every step, rewinding and merging are exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.model.site import LinearSite
from llmcompress.numerics.masks import count_of_zeros
from llmcompress.numerics.schedule import erk_shares
from llmcompress.passes.apply import Compressed, apply_passes
from llmcompress.passes.base import PASSES, Pass
from llmcompress.passes.pruning.lottery import LotteryTicket
from llmcompress.passes.pruning.rigl import Connections
from llmcompress.progress import Silent
from llmcompress.training.adapters import adapted
from llmcompress.training.data.base import Windows
from llmcompress.training.job import Callback, Job
from llmcompress.training.loop import train
from llmcompress.training.settings import Training
from tests.families import FAMILIES, tiny_model, tiny_tokens

CPU = torch.device("cpu")
BRIEF = {"steps": 8, "batch": 4, "learning_rate": 1e-2}


@cache
def map_of(family: str) -> ModelMap:
    return map_model(tiny_model(family))


def make(name: str, **options: Any) -> Pass:
    return PASSES[name](**options)


def compressed(model: PreTrainedModel, family: str, *passes: Pass) -> Compressed:
    return apply_passes(model, map_of(family), passes, RunContext(tiny_tokens(family, batch=6), batch=4, device=CPU))


def sites(model: PreTrainedModel, family: str) -> list[LinearSite]:
    return WholeModel(model, map_of(family), RunContext(tiny_tokens(family), batch=4, device=CPU)).sites()


class Each(Callback):
    """Calls a function after every step."""

    def __init__(self, call: Callable[[int], bool | None]) -> None:
        self.call = call

    def after_step(self, step: int) -> bool:
        return bool(self.call(step))


def briefly(model: PreTrainedModel, family: str, job: Job) -> None:
    ids = tiny_tokens(family, batch=6)
    train(model, Windows(ids), Training(**BRIEF), RunContext(ids, device=CPU), job=job)


def site_weights(model: PreTrainedModel, family: str) -> dict[str, Tensor]:
    return {site.name: site.weight_OI for site in sites(model, family)}


@pytest.mark.parametrize("family", FAMILIES)
def test_rigl_moves_zeros_and_keeps_their_number_in_every_site(family: str) -> None:
    model = tiny_model(family)
    compressed(model, family, make("random", sparsity=0.7))
    before = site_weights(model, family)
    result = compressed(model, family, make("rigl", every=2, training=BRIEF))
    after = site_weights(model, family)
    for site, weight in after.items():
        assert int((weight == 0).sum()) == int((before[site] == 0).sum()), site
    moved = sum(int(((weight == 0) != (before[site] == 0)).sum()) for site, weight in after.items())
    assert moved > 0.01 * sum(each.numel() for each in after.values())
    assert {row.site for row in result.rows} == set(after)


def test_rigl_has_as_many_living_weights_at_every_step_and_grows_by_the_largest_gradients() -> None:
    model = tiny_model("llama")
    compressed(model, "llama", make("random", sparsity=0.7))
    weights = [weight for name, weight in model.named_parameters() if weight.dim() > 1 and "layers" in name]
    connections = Connections(weights, alpha=0.3, every=2, end=6)
    alive = [int(each.sum()) for each in connections.active]
    changed: list[int] = []
    last = [each.clone() for each in connections.active]

    def look(step: int) -> None:
        assert [int(each.sum()) for each in connections.active] == alive
        # a grown weight begins at zero and has moved by the end of the same step
        assert [int(torch.count_nonzero(weight)) for weight in weights] == alive
        changed.append(sum(int((a & ~b).sum()) for a, b in zip(connections.active, last, strict=True)))
        last[:] = [each.clone() for each in connections.active]

    briefly(model, "llama", Job(masks=connections, callback=Each(look)))
    assert changed[0] == 0 and changed[1] > changed[3] > 0 == changed[5] == changed[7]


def test_new_connections_start_at_zero_with_fresh_moments() -> None:
    weight = torch.nn.Parameter(torch.tensor([[3.0, 0.1, 0.0, 0.0]]))
    optimizer = AdamW([weight], lr=0.5, weight_decay=0.0)
    connections = Connections([weight], alpha=1.0, every=1, end=10**9)
    weight.grad = torch.tensor([[0.2, 0.2, 5.0, 1.0]])
    optimizer.step()
    with torch.no_grad():
        weight.copy_(torch.tensor([[3.0, 0.1, 0.0, 0.0]]))
    weight.grad = torch.tensor([[0.2, 0.2, 1.0, 5.0]])
    with torch.no_grad():
        connections._move(0, weight, 0.5, optimizer)
    assert torch.equal(connections.active[0], torch.tensor([[True, False, False, True]]))
    assert weight.tolist() == [[3.0, 0.0, 0.0, 0.0]]
    moments = optimizer.state[weight]["exp_avg"][0]
    assert moments[3] == 0 == moments[1] and moments[0] != 0


def test_rigl_without_zeros_is_refused() -> None:
    with pytest.raises(CompressError) as caught:
        compressed(tiny_model("llama"), "llama", make("rigl", training=BRIEF))
    assert caught.value.code == "rigl.nothing-sparse"


@pytest.mark.parametrize("comparison", ["global", "layer"])
def test_a_ticket_has_exactly_the_compound_share_of_zeros(comparison: str) -> None:
    model = tiny_model("llama_gqa")
    compressed(
        model, "llama_gqa", make("lottery_ticket", rounds=3, share=0.3, comparison=comparison, training=BRIEF)
    )  # fmt: skip
    weights = site_weights(model, "llama_gqa").values()
    dropped = 1 - 0.7**3
    if comparison == "global":
        total = sum(weight.numel() for weight in weights)
        assert sum(int((weight == 0).sum()) for weight in weights) == count_of_zeros(dropped, total)
    else:
        assert all(int((weight == 0).sum()) == count_of_zeros(dropped, weight.numel()) for weight in weights)


@pytest.mark.parametrize("rewind", [0, 3])
def test_a_rewound_ticket_has_the_weights_of_that_step_of_the_first_training(rewind: int) -> None:
    early = tiny_model("gpt2")
    if rewind:
        briefly(early, "gpt2", Job(callback=Each(lambda step: step == rewind)))
    model = tiny_model("gpt2")
    ticket = make("lottery_ticket", rounds=2, rewind_step=rewind, finish="rewound", training=BRIEF)
    compressed(model, "gpt2", ticket)
    expected = dict(early.named_parameters())
    for name, parameter in model.named_parameters():
        zero = parameter == 0 if parameter.dim() > 1 else torch.zeros_like(parameter, dtype=torch.bool)
        assert torch.equal(parameter[~zero], expected[name][~zero]), name


def test_the_trained_ticket_is_the_rewound_one_trained_from_that_step() -> None:
    options: dict[str, Any] = {"rounds": 2, "rewind_step": 2, "training": BRIEF}
    trained, rewound = tiny_model("llama"), tiny_model("llama")
    compressed(trained, "llama", make("lottery_ticket", **options))
    compressed(rewound, "llama", make("lottery_ticket", finish="rewound", **options))
    briefly(rewound, "llama", Job(start=2))
    for (name, a), (_, b) in zip(trained.named_parameters(), rewound.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_early_bird_stops_when_five_masks_agree_and_not_before() -> None:
    class Notes(Silent):
        lines: list[str] = []  # noqa: RUF012

        def note(self, text: str) -> None:
            self.lines.append(text)

    def run(distance: float) -> list[str]:
        notes = Notes()
        notes.lines = []
        model = tiny_model("llama")
        ticket = LotteryTicket(
            rounds=1, early_bird=True, early_bird_every=2, early_bird_distance=distance,
            training=Training(**{**BRIEF, "steps": 14}),
        )  # fmt: skip
        whole = WholeModel(
            model, map_of("llama"), RunContext(tiny_tokens("llama", batch=6), batch=4, device=CPU, progress=notes)
        )
        ticket.apply(whole)
        return notes.lines

    assert [line.split("after ")[1] for line in run(0.9)] == ["step 10 of 14"]
    assert run(1e-6) == []


@pytest.mark.parametrize(
    ("family", "rank"), [*((family, 3) for family in FAMILIES), ("llama_gqa", None), ("gpt2", None), ("mixtral", None)]
)
def test_recovery_keeps_every_zero_and_changes_the_rest(family: str, rank: int | None) -> None:
    model = tiny_model(family)
    compressed(model, family, make("random", sparsity=0.6))
    before = site_weights(model, family)
    others = {name: each.clone() for name, each in model.named_parameters()}
    rows = compressed(model, family, make("recover", rank=rank, training=BRIEF)).rows
    for site, weight in site_weights(model, family).items():
        assert torch.equal(weight == 0, before[site] == 0), site
        assert not torch.equal(weight, before[site])
    if rank is not None:
        moved = {name for name, each in model.named_parameters() if not torch.equal(each, others[name])}
        assert moved == {f"{site}.weight" for site in before}
    assert all(row.sparsity is not None and abs(row.sparsity - 0.6) < 0.01 for row in rows)


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2"])
def test_merging_masked_adapters_is_exact(family: str) -> None:
    model, ids = tiny_model(family), tiny_tokens(family)
    compressed(model, family, make("random", sparsity=0.6))
    with adapted(sites(model, family), rank=2, scale=2.0, seed=0) as parameters, torch.no_grad():
        for each in parameters:
            each.copy_(torch.randn(each.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
        apart = model(ids).logits
    with torch.no_grad():
        assert torch.equal(model(ids).logits, apart)
    assert not any("parametrizations" in name for name, _ in model.named_parameters())


def test_random_zeros_come_from_the_seed_and_larger_sites_are_sparser_under_erk() -> None:
    def zeros() -> Iterator[dict[str, Tensor]]:
        for _ in range(2):
            model = tiny_model("llama_odd")
            compressed(model, "llama_odd", make("random", sparsity=0.6, densities="erk"))
            yield {name: weight == 0 for name, weight in site_weights(model, "llama_odd").items()}

    one, same = zeros()
    assert all(torch.equal(one[name], same[name]) for name in one)
    shares = {name.rpartition(".")[2]: float(mask.float().mean()) for name, mask in one.items()}
    assert shares["up_proj"] > shares["q_proj"] > shares["k_proj"]
    total = sum(mask.numel() for mask in one.values())
    assert sum(int(mask.sum()) for mask in one.values()) == pytest.approx(0.6 * total, abs=len(one))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9, 0.99])
def test_erk_densities_have_the_asked_mean_and_nothing_is_denser_than_dense(share: float) -> None:
    shapes = [(2, 3), (100, 3), (64, 64), (512, 96), (1, 1000)]
    shares = erk_shares(shapes, share)
    sizes = [a * b for a, b in shapes]
    assert sum(each * size for each, size in zip(shares, sizes, strict=True)) == pytest.approx(
        share * sum(sizes), abs=1e-6
    )
    assert all(-1e-9 <= each < 1 for each in shares)
    part = [(1 - each) / (a + b) * a * b for each, (a, b) in zip(shares, shapes, strict=True) if each > 1e-9]
    assert not part or max(part) == pytest.approx(min(part))
