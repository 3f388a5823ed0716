"""Blocks are scored as the papers say, and the lowest go; scores compare with float64 loops over recorded states."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.model.probe import map_model
from llmcompress.model.skeleton import find_blocks
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES
from llmcompress.passes.pruning.depth_search import perplexities_without
from tests.families import FAMILIES, tiny_config, tiny_model, tiny_tokens
from tests.model.test_depth import random_model, with_blocks_skipped

BLOCKS = 5


def llama(seed=0):
    config = tiny_config("llama_gqa")
    config.num_hidden_layers = BLOCKS
    model = random_model(config)
    generator = torch.Generator().manual_seed(seed)
    for _, block in find_blocks(model):  # blocks of different strength, so that scores differ
        block.mlp.down_proj.weight.data *= float(torch.rand((), generator=generator)) * 2
    return model


def windows(count=5, tokens=10):
    return tiny_tokens("llama_gqa", batch=count, length=tokens, seed=3)


@functools.cache
def map_of_llama():
    return map_model(llama())


def run(model, *passes, seed=0, data=None):
    same = model.config.model_type == "llama" and model.config.num_hidden_layers == BLOCKS
    return apply_passes(
        model,
        map_of_llama() if same else map_model(model),
        passes,
        RunContext(windows() if data is None else data, batch=2, seed=seed),
    )


def depth(**options):
    return PASSES["depth"](**options)


def removed(rows):
    return [int(row.site.rpartition(".")[2]) for row in rows]


@torch.no_grad()
def states(model):
    """The state before every block and behind the last one, for every window: depths × windows × tokens × size."""
    found = {}
    handles = []
    for index, (_, block) in enumerate(find_blocks(model)):

        def note(_, args, kwargs, output, index=index):
            found[index] = (args[0] if args else kwargs["hidden_states"]).double()
            found[index + 1] = (output if isinstance(output, torch.Tensor) else output[0]).double()

        handles.append(block.register_forward_hook(note, with_kwargs=True))
    model(windows(), use_cache=False)
    for handle in handles:
        handle.remove()
    return [found[index] for index in range(len(found))]


def mean_cosine(before, after, first=0):
    cosines = []
    for window in range(before.shape[0]):
        for token in range(first, before.shape[1]):
            x, y = before[window, token], after[window, token]
            cosines.append(float(x @ y / (x.norm() * y.norm())))
    return cosines


def slow_influence(model, first=0):
    seen = states(model)
    return [
        1 - sum(cosines) / len(cosines)
        for cosines in (mean_cosine(before, after, first) for before, after in pairwise(seen))
    ]


@torch.no_grad()
def slow_perplexity(model, gone):
    logits = with_blocks_skipped(model, gone)(windows(), use_cache=False).logits.double()
    return math.exp(float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows()[:, 1:].flatten())))


@pytest.mark.parametrize("first", [0, 1])
def test_block_influence_is_one_minus_the_mean_cosine_of_input_and_output(first):
    model = llama()
    expected = slow_influence(model, first)
    result = run(model, depth(count=BLOCKS - 1, skip_first_token=bool(first)))
    assert removed(result.rows) == sorted(range(BLOCKS), key=expected.__getitem__)[: BLOCKS - 1]
    for row in result.rows:
        assert row.score == pytest.approx(expected[removed([row])[0]], abs=1e-6)
        assert 0 <= row.score <= 2
        assert (row.removed, row.parameters, row.tokens) == (1, 0, 50)


def test_greedy_influence_is_measured_anew_on_what_is_left():
    model = llama()
    gone, scores = [], []
    for _ in range(3):
        left = [index for index in range(BLOCKS) if index not in gone]
        without = with_blocks_skipped(model, gone)
        values = dict(zip(left, (slow_influence(without)[index] for index in left), strict=True))
        gone.append(min(values, key=values.__getitem__))
        scores.append(values[gone[-1]])
    rows = run(llama(), depth(count=3, mode="greedy")).rows
    assert removed(rows) == gone
    assert [row.score for row in rows] == pytest.approx(scores, abs=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_contiguous_blocks_have_the_least_angle_between_them(count):
    model = llama()
    seen = states(model)
    angles = []
    for start in range(BLOCKS - count + 1):
        cosines = mean_cosine(seen[start], seen[start + count])
        angles.append(sum(math.acos(cosine) for cosine in cosines) / len(cosines) / math.pi)
    best = min(range(len(angles)), key=angles.__getitem__)
    rows = run(model, depth(count=count, mode="contiguous")).rows
    assert removed(rows) == list(range(best, best + count))
    assert [row.score for row in rows] == pytest.approx([angles[best]] * count, abs=1e-6)


def test_greedy_perplexity_removes_the_block_without_which_perplexity_is_lowest_each_time():
    model = llama()
    gone = []
    for _ in range(2):
        values = {i: slow_perplexity(model, [*gone, i]) for i in range(BLOCKS) if i not in gone}
        gone.append(min(values, key=values.__getitem__))
    rows = run(llama(), depth(count=2, score="perplexity", mode="greedy")).rows
    assert removed(rows) == gone
    assert rows[-1].score == pytest.approx(slow_perplexity(model, gone), rel=1e-4)


def slow_screened(model, count, screen):
    """Greedy by perplexity among the few blocks of least influence on what is left."""
    gone = []
    for _ in range(count):
        left = [index for index in range(BLOCKS) if index not in gone]
        moved = dict(
            zip(left, (slow_influence(with_blocks_skipped(model, gone))[index] for index in left), strict=True)
        )
        values = {
            index: slow_perplexity(model, [*gone, index]) for index in sorted(left, key=moved.__getitem__)[:screen]
        }
        gone.append(min(values, key=values.__getitem__))
    return gone


@pytest.mark.parametrize("screen", [1, 2, 4, 9])
def test_screened_rounds_try_the_blocks_of_least_influence_alone(screen):
    rows = run(llama(), depth(count=3, score="perplexity", mode="greedy", screen=screen)).rows
    assert removed(rows) == slow_screened(llama(), 3, screen)


def test_screening_belongs_to_the_greedy_search_by_perplexity():
    for options in ({"mode": "greedy"}, {"score": "perplexity"}, {"score": "perplexity", "mode": "contiguous"}):
        with pytest.raises(ValidationError, match="screen"):
            depth(screen=2, **options)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_without_blocks_is_that_of_the_whole_model_in_every_family(family):
    model = tiny_model(family)
    data = tiny_tokens(family, batch=3, length=10, seed=3)
    whole = WholeModel(model, map_model(model), RunContext(data, batch=2))
    blocks = range(len(whole.map.blocks))
    candidates = [(), *((index,) for index in reversed(blocks))]
    found = perplexities_without(whole, candidates, lambda _: None)
    for gone, perplexity in zip(candidates, found, strict=True):
        logits = with_blocks_skipped(tiny_model(family), gone)(data, use_cache=False).logits.double()
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), data[:, 1:].flatten())
        assert perplexity == pytest.approx(math.exp(float(loss)), rel=1e-4)


def test_a_greedy_round_runs_what_its_candidates_share_once_and_tells_how_far_it_is():
    model = llama()
    whole = WholeModel(model, map_of_llama(), RunContext(windows(), batch=5))
    runs, shares = [], []
    for _, block in find_blocks(model):
        block.register_forward_hook(lambda _, args, __: runs.append(args[0].shape[1]))
    perplexities_without(whole, [(index,) for index in range(BLOCKS)], shares.append)
    assert runs.count(windows().shape[1]) == BLOCKS - 1 + sum(range(BLOCKS))
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)


def test_perplexity_in_one_shot_ranks_blocks_by_what_each_alone_costs():
    model = llama()
    values = [slow_perplexity(model, [index]) for index in range(BLOCKS)]
    rows = run(llama(), depth(count=3, score="perplexity")).rows
    assert removed(rows) == sorted(range(BLOCKS), key=values.__getitem__)[:3]
    assert [row.score for row in rows] == pytest.approx(sorted(values)[:3], rel=1e-4)


def test_contiguous_perplexity_tries_every_run():
    model = llama()
    values = [slow_perplexity(model, [start, start + 1]) for start in range(BLOCKS - 1)]
    best = min(range(BLOCKS - 1), key=values.__getitem__)
    assert removed(run(llama(), depth(count=2, score="perplexity", mode="contiguous")).rows) == [best, best + 1]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family_the_smaller_model_is_the_dense_one_with_that_block_skipped(family):
    model = tiny_model(family)
    data = tiny_tokens(family, batch=3, length=10, seed=3)
    dense = tiny_model(family)
    result = run(model, depth(count=1), data=data)
    expected = with_blocks_skipped(dense, removed(result.rows))(data, use_cache=False).logits
    torch.testing.assert_close(result.model(data).logits, expected, rtol=1e-4, atol=2e-5)
    before = map_model(dense).blocks
    assert [row.site for row in result.rows] == [before[removed(result.rows)[0]].name]
    assert len(map_model(result.model).blocks) == len(before) - 1


@torch.no_grad()
def test_a_block_that_does_nothing_goes_first_and_nobody_notices():
    model = llama()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[3].get_submodule(name).weight.zero_()
    before = model(windows()).logits
    for mode in ("one_shot", "contiguous"):
        trial = llama()
        trial.load_state_dict(model.state_dict())
        result = run(trial, depth(count=1, mode=mode))
        assert removed(result.rows) == [3]
        torch.testing.assert_close(result.model(windows()).logits, before, rtol=1e-5, atol=1e-5)


def test_random_blocks_depend_on_the_seed_alone_and_need_no_data():
    empty = torch.empty(0, 4, dtype=torch.long)
    draws = [removed(run(llama(), depth(count=2, score="random"), seed=seed, data=empty).rows) for seed in range(6)]
    assert draws[0] == removed(run(llama(), depth(count=2, score="random"), seed=0, data=empty).rows)
    assert len({tuple(draw) for draw in draws}) > 1
    assert not depth(count=2, score="random").uses_data()
    runs = [
        removed(run(llama(), depth(count=2, score="random", mode="contiguous"), seed=s, data=empty).rows)
        for s in (0, 1)
    ]
    assert all(second - first == 1 for first, second in runs)


@torch.no_grad()
def test_rounding_before_or_after_gives_blocks_with_codes():
    rtn = PASSES["rtn"](scheme="int8_channel")
    after = run(llama(), depth(count=2), rtn)
    before = run(llama(), rtn, depth(count=2))
    assert removed(after.rows[:2]) == removed(before.rows[-2:])
    torch.testing.assert_close(after.model(windows()).logits, before.model(windows()).logits, rtol=1e-3, atol=1e-3)
    assert all(len(find_blocks(result.model)) == 3 for result in (after, before))


@torch.no_grad()
def test_the_model_is_the_same_while_blocks_are_scored():
    model = llama()
    whole = WholeModel(
        model,
        map_model(model),
        RunContext(windows(), batch=2),
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for score in ("block_influence", "perplexity"):
        for mode in ("one_shot", "greedy", "contiguous"):
            depth(count=2, score=score, mode=mode)._chosen(whole, 2)
    assert len(find_blocks(model)) == BLOCKS
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("asked", "blocks", "expected"), [(3, 5, 3), (0.25, 32, 8), (0.25, 5, 1), (0.01, 5, 1), (0.5, 3, 2)]
)
def test_a_fraction_is_rounded_to_blocks(asked, blocks, expected):
    option = "count" if isinstance(asked, int) else "fraction"
    assert depth(**{option: asked}).blocks_to_remove(blocks) == expected


@pytest.mark.parametrize("asked", [{"count": 5}, {"count": 7}, {"fraction": 0.95}])
def test_one_block_must_stay(asked):
    with pytest.raises(CompressError, match=r"depth\.nothing-left"):
        run(llama(), depth(**asked))


@pytest.mark.parametrize(
    "options",
    [
        {"count": 0},
        {"fraction": 1.5},
        {"count": 1, "fraction": 0.5},
        {"count": 1, "score": "random", "mode": "greedy"},
        {"count": 1, "score": "perplexity", "skip_first_token": True},
    ],
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ValidationError):
        depth(**options)
