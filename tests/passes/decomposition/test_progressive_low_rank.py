"""Several cuts with training in between: the ranks asked for, the other weights untouched."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from llmcompress.errors import CompressError
from llmcompress.modules.low_rank import LowRankLinear
from llmcompress.numerics.rank_allocation import uniform_rank
from llmcompress.passes.base import PASSES
from tests.families import tiny_model
from tests.passes.decomposition.factored import compressed, logits, map_of


def progressive(**options: Any) -> Any:
    return PASSES["progressive_low_rank"](
        **{
            "fraction": 0.3,
            "ranks": "uniform",
            "cuts": 2,
            "training": {"steps": 4, "batch": 4},
            "sites": "*.mlp.*",
            **options,
        }
    )


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2"])
@pytest.mark.parametrize("cuts", [1, 3])
def test_at_the_end_ranks_are_those_of_svd_and_only_factors_have_changed(family: str, cuts: int) -> None:
    model, rows = compressed(family, progressive(cuts=cuts))
    sizes = {
        block.full(s.name): (s.outputs, s.inputs) for block in map_of(family).blocks for s in block.structure.sites
    }
    assert {row.site for row in rows} == {name for name in sizes if ".mlp." in name}
    for row in rows:
        outputs, inputs = sizes[row.site]
        assert row.rank == uniform_rank(outputs, inputs, 0.7, 1) == model.get_submodule(row.site).rank
        assert row.parameters == row.rank * (outputs + inputs)
        assert isinstance(model.get_submodule(row.site), LowRankLinear)
    before = tiny_model(family, seed=1).state_dict()
    after = {key: tensor for key, tensor in model.state_dict().items() if ".mlp." not in key}
    assert after and all(torch.equal(tensor, before[key]) for key, tensor in after.items())


def test_training_moves_the_factors_and_repeats_itself() -> None:
    trained, _ = compressed("llama", progressive())
    again, _ = compressed("llama", progressive())
    assert torch.equal(logits(trained), logits(again))
    slower, _ = compressed("llama", progressive(training={"steps": 4, "batch": 4, "learning_rate": 1e-9}))
    assert not torch.equal(logits(trained), logits(slower))


def test_with_hardly_any_training_one_cut_is_svd() -> None:
    still = {"steps": 1, "learning_rate": 1e-12, "batch": 4}
    model, _ = compressed("llama_gqa", progressive(cuts=1, training=still))
    cut, _ = compressed("llama_gqa", PASSES["svd"](fraction=0.3, ranks="uniform", sites="*.mlp.*"))
    torch.testing.assert_close(logits(model), logits(cut), atol=1e-4, rtol=0)


def test_ranks_can_be_decided_and_sites_that_stay_dense_say_so() -> None:
    _, rows = compressed("llama_gqa", progressive(ranks="energy", fraction=0.1, sites="*"))
    assert len({row.rank for row in rows}) > 2
    assert all(bool(row.degraded) == (row.rank is None) for row in rows)


def test_fewer_steps_than_cuts_are_refused() -> None:
    with pytest.raises(ValidationError, match="at least 5 training steps"):
        progressive(cuts=5)


def test_globs_that_leave_nothing_are_refused() -> None:
    with pytest.raises(CompressError, match="select no linear"):
        progressive(exclude="*").check(map_of("llama"))
