"""How a published model is loaded, for every runtime that can: code that a reader copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmcompress.exporters.base import EXPORTERS


@dataclass(frozen=True)
class Snippet:
    """Code for one runtime; `{id}` is the repository, `{folder}` the artifact's folder in it with a slash, or empty."""

    runtime: str
    language: str
    code: str


_LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{id}", subfolder="{subfolder}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{id}", subfolder="{subfolder}")
ids = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0]))"""
_PIP = "# pip install {packages}\n"
_VLLM = Snippet("vLLM", "sh", "vllm serve {id}")
_TRANSFORMERS = Snippet("transformers", "python", _PIP.replace("{packages}", "transformers") + _LOAD)
_WITH_US = Snippet(
    "transformers with llmcompress", "python", "import llmcompress  # without it, loading is refused\n" + _LOAD
)

SNIPPETS: Mapping[str, tuple[Snippet, ...]] = {
    "plain": (_TRANSFORMERS, _VLLM),
    "compressed-tensors": (
        Snippet("transformers", "python", _PIP.replace("{packages}", "transformers compressed-tensors") + _LOAD),
        _VLLM,
    ),
    "bitsandbytes": (
        Snippet("transformers", "python", _PIP.replace("{packages}", "transformers bitsandbytes accelerate") + _LOAD),
    ),
    "gptq": (Snippet("transformers", "python", _PIP.replace("{packages}", "transformers gptqmodel") + _LOAD), _VLLM),
    "llmcompress": (_WITH_US,),
    "archive": (_WITH_US,),
    "gguf": (
        Snippet(
            "llama.cpp", "sh", 'llama-cli -hf {id} -p "The"      # or a chat page and an API: llama-server -hf {id}'
        ),
    ),
    "onnx": (
        Snippet(
            "onnxruntime",
            "python",
            """# pip install optimum-onnx onnxruntime
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

model = ORTModelForCausalLM.from_pretrained("{id}", subfolder="{subfolder}")
tokenizer = AutoTokenizer.from_pretrained("{id}", subfolder="{subfolder}")""",
        ),
    ),
    "openvino": (
        Snippet(
            "OpenVINO",
            "python",
            """# pip install optimum-intel openvino
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer

model = OVModelForCausalLM.from_pretrained("{id}", subfolder="{subfolder}")
tokenizer = AutoTokenizer.from_pretrained("{id}", subfolder="{subfolder}")""",
        ),
    ),
    "tensorrt_llm": (Snippet("TensorRT-LLM", "sh", "trtllm-serve {id}"),),
}
"""By target, or by the format of a Hugging Face folder; any other target is downloaded and run as its exporter says."""


def snippets_for(kind: str, *, repository: str, folder: str) -> list[Snippet]:
    """The code to load an artifact; `folder`: its place in the repository, empty for the root."""
    known = [each for each in SNIPPETS.get(kind, ()) if not folder or "{subfolder}" in each.code]
    if not known:
        exporter = EXPORTERS[kind]
        name = repository.partition("/")[2]
        fetch = f"hf download {repository} --local-dir {name}"
        if folder:
            fetch = f"hf download {repository} --local-dir {name} --include '{folder}*'"
        run = exporter.how_to_run
        place = f"cd {name}/{folder}".rstrip("/")
        return [Snippet(kind, "sh", f"{fetch}\n{place}"), Snippet(kind, exporter.language, run)]
    values = {"{id}": repository, "{subfolder}": folder.rstrip("/")}
    found = []
    for each in known:
        code = each.code if folder else each.code.replace(', subfolder="{subfolder}"', "")
        for name, value in values.items():
            code = code.replace(name, value)
        found.append(Snippet(each.runtime, each.language, code))
    return found
