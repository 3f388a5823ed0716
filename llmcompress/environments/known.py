"""The environments in which tools run whose packages clash with those of the running interpreter, as data."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from llmcompress.errors import CompressError, ExitCode, did_you_mean

CPU_TORCH = "torch==2.13.0"
"""What is tested; a tool that only reads a model and writes a graph needs no GPU."""


@dataclass(frozen=True)
class Environment:
    """Packages that a tool needs, whether they are here or in a virtual environment of their own."""

    name: str
    purpose: str
    """What it is for, in one line."""
    requirements: tuple[str, ...]
    """PEP 508: an interpreter that satisfies all of them is used as it is."""
    pins: tuple[str, ...]
    """The versions that were tested together: constraints for what is installed."""

    @property
    def key(self) -> str:
        """Name and hash of what decides its content; another Python has another folder."""
        version = f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}"
        text = "\n".join([version, CPU_TORCH, *self.requirements, *self.pins])
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


_TRANSFORMERS = "transformers==4.57.*"
_PINS = (
    *("transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.2", "accelerate==1.15.0"),
    *("numpy==2.4.6", "safetensors==0.8.0"),
)
_OPTIMUM_PINS = (*_PINS, "optimum==2.1.0")
_ONNX_PINS = ("onnx==1.23.2", "onnxruntime==1.32.0", "onnx-ir==1.1.0")

ENVIRONMENTS: Mapping[str, Environment] = MappingProxyType(
    {
        each.name: each
        for each in (
            Environment(
                "optimum-onnx",
                "Optimum's exporter to ONNX, for the target onnx",
                (
                    *(_TRANSFORMERS, "optimum-onnx==0.1.*", "accelerate>=1.10", "onnx>=1.19", "onnxruntime>=1.24"),
                    *("onnx-ir>=0.1.16", "onnxscript>=0.5.4"),
                ),
                (*_OPTIMUM_PINS, *_ONNX_PINS, "optimum-onnx==0.1.0", "onnxscript==0.7.2"),
            ),
            Environment(
                "optimum-intel",
                "Optimum's exporter to OpenVINO, for the target openvino",
                (
                    *(_TRANSFORMERS, "optimum-intel==1.27.*", "openvino>=2026.0", "nncf>=3.0"),
                    "openvino-tokenizers>=2026.0",
                ),
                (
                    *(*_OPTIMUM_PINS, "optimum-intel==1.27.0", "openvino==2026.4.1", "nncf==3.4.0"),
                    "openvino-tokenizers==2026.4.1.0",
                ),
            ),
            Environment(
                "onnxruntime-genai",
                "the model builder of onnxruntime-genai, for the target onnx_genai",
                # every version of the builder knows one major of transformers: 0.15 knows 4.57, from 0.16 on 5
                (
                    *("transformers>=4.57", "onnxruntime-genai>=0.15", "onnx>=1.19", "onnxruntime>=1.24"),
                    "onnx-ir>=0.1.16",
                ),
                (*_PINS, *_ONNX_PINS, "onnxruntime-genai==0.15.2"),
            ),
        )
    }
)
"""By name. Versions are those of one environment in which all of them were run."""


def environment_called(name: str) -> Environment:
    """The environment of that name.

    Raises: CompressError naming the nearest known name.
    """
    if name not in ENVIRONMENTS:
        raise CompressError(
            "environment.unknown",
            f"unknown environment {name!r}",
            fix=did_you_mean(name, ENVIRONMENTS),
            exit_code=ExitCode.USAGE,
        )
    return ENVIRONMENTS[name]
