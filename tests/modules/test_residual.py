"""Blocks in segments: what norms and skips compute, and that plain data builds them again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmcompress.modules.base import from_named_spec, named_spec
from llmcompress.modules.residual import PassThrough, Segment, SegmentNorm, ShortcutBlock


class Adds(nn.Module):
    """A block that adds a constant to channels 2 to 4 and then one to channels 5 to 6 of its input."""

    kind = "a block"

    def __init__(self, *, pair: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 5.0, 7.0]))
        self.pair = pair

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, None]:
        output = hidden_states + self.weight
        return (output, None) if self.pair else output


def test_a_lane_norm_divides_its_channels_by_the_original_width():
    x = torch.randn(2, 3, 7)
    found = SegmentNorm(2, 4, 10, 1e-3)(x)
    segment = x[..., 2:6]
    torch.testing.assert_close(found, segment / (segment.square().sum(-1, keepdim=True) / 10 + 1e-3).sqrt())


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_shortcut_block_changes_the_basis_on_both_skips(pair, by_keyword):
    wrapper = ShortcutBlock((2, 3, 2), torch.float32)
    first, second = torch.randn(3, 2), torch.randn(2, 3)
    wrapper.set_shortcuts([first, second])
    wrapper.take(Adds(pair=pair))
    x = torch.randn(1, 4, 2)
    output = wrapper(hidden_states=x, mask=None) if by_keyword else wrapper(x, None)
    found = output[0] if pair else output
    expected = (x @ first.T + torch.tensor([1.0, 2.0, 3.0])) @ second.T + torch.tensor([5.0, 7.0])
    torch.testing.assert_close(found, expected)
    assert wrapper.kind == "a block"


def test_a_block_that_adds_once_has_one_skip():
    wrapper = ShortcutBlock((2, 5), torch.float32)
    shortcut = torch.randn(5, 2)
    wrapper.set_shortcuts([shortcut])
    wrapper.take(Adds(pair=False))
    x = torch.randn(1, 4, 2)
    torch.testing.assert_close(wrapper(x), x @ shortcut.T + torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0]))


def test_a_lane_pads_what_a_linear_gives():
    segment = Segment(2, 1)
    segment.take(nn.Linear(3, 4))
    x = torch.randn(5, 3)
    torch.testing.assert_close(segment(x), nn.functional.pad(segment.inner(x), (2, 1)))


@pytest.mark.parametrize(
    "module",
    [SegmentNorm(2, 4, 10, 1e-5), Segment(2, 1), ShortcutBlock((2, 3, 4), torch.float32), PassThrough(6)],
    ids=lambda module: type(module).__name__,
)
def test_plain_data_builds_the_module_again(module):
    again = from_named_spec(named_spec(module), torch.float32)
    assert type(again) is type(module)
    assert named_spec(again) == named_spec(module)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in module.state_dict().items()}
