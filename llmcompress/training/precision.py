"""Layered mixed precision: modules that compute in float32 while the others compute in bfloat16 or float16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from llmcompress.errors import CompressError, ExitCode


@contextmanager
def computing_in_float32(model: nn.Module, globs: Sequence[str], device: torch.device) -> Iterator[None]:
    """For as long as the context lasts, autocast is off inside every module whose full name matches.

    Source: Li et al. 2023 (layered mixed-precision training), as an option of the user's; which layers need it is not
    measured here.

    Raises: CompressError for a glob that matches nothing.
    """
    with ExitStack() as stack:
        for glob in globs:
            found = [module for name, module in model.named_modules() if fnmatchcase(name, glob)]
            if not found:
                raise CompressError(
                    "training.no-such-module",
                    f"{glob!r} matches no module of the model",
                    where="training.float32",
                    fix="use globs of full module names, such as `lm_head` or `*.layers.0.*`",
                    exit_code=ExitCode.USAGE,
                )
            for module in found:
                for handle in _hooks(module, device):
                    stack.callback(handle.remove)
        yield


def _hooks(module: nn.Module, device: torch.device) -> list[Any]:
    """Autocast is turned off before the module's forward and on again after it, an exception included."""
    entered: list[ExitStack] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        stack = ExitStack()
        stack.enter_context(torch.autocast(device.type, enabled=False))
        entered.append(stack)
        return tree_map(_wide, args), tree_map(_wide, kwargs)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        entered.pop().close()

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
