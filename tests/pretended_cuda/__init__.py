"""A CUDA device for machines without one: see device.cpp."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths


def build(folder: Path) -> Path:
    """Compile it into a folder (half a minute); the library must be loaded before torch is imported."""
    library = folder / "device.so"
    where = library_paths()
    subprocess.run(
        [
            *("g++", "-O1", "-std=c++20", "-shared", "-fPIC"),
            *(f"-I{path}" for path in include_paths()),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            str(Path(__file__).parent / "device.cpp"),
            *("-o", str(library)),
            *(f"-L{path}" for path in where),
            *(f"-Wl,-rpath,{path}" for path in where),
            *("-ltorch_cpu", "-lc10"),
        ],
        check=True,
    )
    return library
