"""The baseline of a pass: another registered pass with the same selection."""

from __future__ import annotations

from collections.abc import Sequence

from llmcompress.passes.base import PASSES, BlockPass


def with_options_of(each: BlockPass, name: str, options: Sequence[str]) -> BlockPass:
    """Another registered pass, on the same sites and with these options of `each`, its overrides included."""
    overrides = {
        glob: {option: value for option, value in said.items() if option in options}
        for glob, said in each.overrides.items()
    }
    same = {option: getattr(each, option) for option in (*options, "sites", "exclude")}
    found = PASSES[name].model_validate({**same, "overrides": overrides})
    assert isinstance(found, BlockPass)
    return found
