"""What pyproject.toml promises: an extra that has everything, and no upper bound without a reason."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

TEXT = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
PROJECT: dict[str, Any] = tomllib.loads(TEXT)["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
APART = {"onnx-export", "openvino-export", "docs", "dev", "all"}
"""The first two need another transformers, docs and dev are for those who work on the project."""


def named(extra: str) -> set[str]:
    """Extras that an extra has."""
    found = (re.fullmatch(r"llmcompress\[(.+)\]", each) for each in EXTRAS[extra])
    return {name for each in found if each for name in each[1].split(",")}


def test_all_has_every_extra_that_works_in_one_environment() -> None:
    assert named("all") == EXTRAS.keys() - APART


def test_whoever_runs_the_tests_has_what_all_has_but_hardware_and_tokenizers_of_old() -> None:
    assert named("all") - named("dev") == {"sentencepiece", "energy"}


def test_every_upper_bound_is_explained() -> None:
    wanted = [*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]
    bounded = {re.split(r"[<>=!~\[ ]", each)[0]: each.split("<")[1] for each in wanted if "<" in each}
    assert {"transformers", "trl"} <= bounded.keys()
    told = "\n".join(line for line in TEXT.splitlines() if line.startswith("#"))
    assert not [name for name, bound in bounded.items() if not re.search(rf"{name} <{re.escape(bound)}[,:]", told)]
