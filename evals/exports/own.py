"""What each runtime's own tools make of a dense model at 4 bits, in groups of 64 where they can, tables in 8 bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llmcompress.environments.known import environment_called
from llmcompress.environments.use import run
from llmcompress.errors import CompressError
from llmcompress.model_export import export
from llmcompress.progress import Silent

Made = tuple[str, str, Path, str]
"""Title, target, place, and the name of the runner."""
GROUP = 64
OWN_GGUF = "llama.cpp Q4_0, table Q8_0"
OWN_ONNX = f"ONNX Runtime round to nearest, g{GROUP}, table float32"
OWN_GENAI = f"onnxruntime-genai builder, g{GROUP}, table int8"
OWN_OPENVINO = f"NNCF int4, g{GROUP}, table int8"


def own_roundings(dense: str, scratch: Path, targets: Sequence[str]) -> Iterator[Made]:
    """Of those targets; a tool that cannot be run is left out and said."""
    makers: dict[str, Callable[[str, Path], Iterator[Made]]] = {
        "gguf": _llama_cpp,
        "onnx": _onnxruntime,
        "onnx_genai": _genai,
        "openvino": _nncf,
    }
    for target in targets:
        try:
            yield from makers[target](dense, scratch) if target in makers else ()
        except (CompressError, ImportError) as problem:
            print(f"{target}: its own rounding is left out: {problem}", flush=True)


def _llama_cpp(dense: str, scratch: Path) -> Iterator[Made]:
    from cyllama.llama import llama_cpp
    from gguf import GGMLQuantizationType, LlamaFileType

    export(dense, "gguf", scratch / "dense-gguf", run=False)
    for title, kind, table in (
        (OWN_GGUF, "MOSTLY_Q4_0", "Q8_0"),
        ("llama.cpp Q4_K_M", "MOSTLY_Q4_K_M", None),
    ):
        settings = llama_cpp.LlamaModelQuantizeParams()
        settings.ftype, settings.nthread = int(LlamaFileType[kind]), 1
        if table is not None:
            settings.token_embedding_type = settings.output_tensor_type = int(GGMLQuantizationType[table])
        file = scratch / f"{kind}.gguf"
        llama_cpp.model_quantize(str(scratch / "dense-gguf" / "model.gguf"), str(file), settings)
        yield title, "gguf", file, "llama_cpp"


def _onnxruntime(dense: str, scratch: Path) -> Iterator[Made]:
    """Round to nearest, of our dense export; its table stays in float32, which its quantizer does not reach."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    export(dense, "onnx", scratch / "dense-onnx", run=False)
    place = scratch / "own-onnx"
    shutil.copytree(scratch / "dense-onnx", place, ignore=shutil.ignore_patterns("*.onnx*"))
    graph = onnx.load(str(scratch / "dense-onnx" / "model.onnx"))
    quantizer = MatMulNBitsQuantizer(graph, block_size=GROUP, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(place / "model.onnx"), use_external_data_format=True)
    yield OWN_ONNX, "onnx", place, "onnxruntime"


def _genai(dense: str, scratch: Path) -> Iterator[Made]:
    """As its builder does by default, and with our groups and an 8-bit table."""
    equal = [f"block_size={GROUP}", "algo_config=rtn_last"]
    for title, options in (
        ("onnxruntime-genai builder, defaults", []),
        (OWN_GENAI, equal),
    ):
        place = scratch / f"own-genai-{len(options)}"
        given = ["-m", "onnxruntime_genai.models.builder", "-i", dense, "-o", str(place), "-p", "int4", "-e", "cpu"]
        more = ["-c", str(scratch / "genai-cache"), "--extra_options", "hf_token=false", *options]
        run(environment_called("onnxruntime-genai"), [*given, *more], doing="build", progress=Silent())
        shutil.copyfile(Path(dense) / "config.json", place / "config.json")
        yield title, "onnx_genai", place, "onnxruntime_genai"


def _nncf(dense: str, scratch: Path) -> Iterator[Made]:
    place = scratch / "own-openvino"
    sizes = ["--weight-format", "int4", "--group-size", str(GROUP), "--ratio", "1.0", "--sym"]
    task = ["--task", "text-generation-with-past", str(place)]
    command = ["-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", dense, *sizes, *task]
    run(environment_called("optimum-intel"), command, doing="export", progress=Silent())
    yield OWN_OPENVINO, "openvino", place, "openvino"
