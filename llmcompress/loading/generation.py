"""Checks the model's generation config early, because saving would refuse an invalid one at the very end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from llmcompress.errors import CompressError
from llmcompress.storage.json_file import read_json

_NAMED = re.compile(r"`(\w+)`")


def read_generation_config(folder: Path, config: PretrainedConfig) -> tuple[GenerationConfig, list[str]]:
    """The settings, without those that transformers would refuse to save, and a note for each one dropped.

    Settings that have no effect (a temperature without sampling) are dropped, so that the model generates as before.

    Raises: CompressError when the file is not JSON.
    """
    file = folder / "generation_config.json"
    if not file.exists():
        return GenerationConfig.from_model_config(config), []
    return _usable({key: value for key, value in read_json(file).items() if not key.startswith("_")}, str(file))


def usable_generation_config(
    found: GenerationConfig | None, config: PretrainedConfig
) -> tuple[GenerationConfig, list[str]]:
    """The same of a model in memory, which may have none."""
    if found is None:
        return GenerationConfig.from_model_config(config), []
    return _usable({key: value for key, value in found.to_dict().items() if not key.startswith("_")}, "in memory")


def _usable(data: dict[str, Any], where: str) -> tuple[GenerationConfig, list[str]]:
    dropped: list[str] = []
    while True:
        try:
            settings = GenerationConfig.from_dict(data)
            settings.validate(strict=True)
            break
        except Exception as problem:
            key = _culprit(str(problem), data)
            if key is None:
                raise CompressError(
                    "model.bad-generation-config",
                    f"generation_config.json cannot be used: {str(problem).strip().splitlines()[0]}",
                    where=where,
                    fix="correct or delete the file (without it transformers uses its defaults)",
                ) from problem
            dropped.append(f"{key}={data.pop(key)!r}")
    if not dropped:
        return settings, []
    return settings, [f"generation_config.json is invalid; the saved copy leaves out {', '.join(dropped)}"]


def _culprit(problem: str, data: dict[str, Any]) -> str | None:
    """The setting that the message complains about: the first one it names that the file sets."""
    named = [name for name in _NAMED.findall(problem) if name in data and name != "do_sample"]
    return named[0] if named else None
