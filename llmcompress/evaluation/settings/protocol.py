"""Published evaluation protocols by name: `evals/protocols` of a checkout, `llmcompress/protocols` of a wheel.

A protocol is the values of some options of `perplexity:`; whatever a recipe writes beside its name counts more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from llmcompress.errors import CompressError, ExitCode, did_you_mean

_PACKAGE = Path(__file__).parent.parent.parent


def protocol_names() -> tuple[str, ...]:
    """`gptq`, `llama-cpp`, …"""
    return tuple(path.stem for path in sorted(_folder().glob("*.yaml")))


def protocol_options(name: str) -> dict[str, Any]:
    """The options of a protocol, without those that it leaves at their defaults.

    Raises: CompressError naming the nearest one.
    """
    if name not in protocol_names():
        raise CompressError(
            "evaluate.unknown-protocol",
            f"unknown protocol {name!r}",
            fix=did_you_mean(name, protocol_names()),
            exit_code=ExitCode.USAGE,
        )
    found: dict[str, Any] = yaml.safe_load((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


def protocol_summary(name: str) -> str:
    """The first comment line of a protocol."""
    text = (_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    return text.partition("\n")[0].removeprefix("#").strip()


def _folder() -> Path:
    """The wheel's copy where there is one, otherwise the checkout's."""
    inside, beside = _PACKAGE / "protocols", _PACKAGE.parent / "evals" / "protocols"
    return inside if inside.is_dir() else beside
