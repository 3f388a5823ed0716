"""Faults of a model's files, of recipes and of texts: each function does one to a folder with everything in order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.helper
import torch

from tests.tiny_folder import edit_json, edit_tensors, with_a_far_token, write_tiny_llama

Q = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"
CHEAPEST = "passes: [rtn: {scheme: int4_g16}]\nevaluate: {}\n"
CALIBRATED = """calibration: {source: text.jsonl, samples: 4, tokens: 32}
passes: [gptq: {scheme: int4_g16}]
evaluate: {}
"""
Inject = Callable[[Path], object]


def write_everything(place: Path) -> None:
    """`dense`, the same in shards, recipes and a calibration text; nothing is wrong with any of them."""
    write_tiny_llama(place / "dense", intermediate_size=64)
    write_tiny_llama(place / "shards", intermediate_size=64, shard="30KB")
    (place / "cheapest.yaml").write_text(CHEAPEST)
    (place / "calibrated.yaml").write_text(CALIBRATED)
    rows = [{"text": f"the quick brown fox {number} jumps over the lazy dog " * 8} for number in range(12)]
    (place / "text.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def file(name: str, content: bytes | str | Callable[[bytes], bytes]) -> Inject:
    """The file gets this content, or what a function makes of its own."""

    def inject(place: Path) -> None:
        path = place / name
        if callable(content):
            path.write_bytes(content(path.read_bytes()))
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return inject


def config(name: str = "dense/config.json", **changes: object) -> Inject:
    """Keys of a JSON file; None removes one."""
    return lambda place: edit_json(place / name, **changes)


def recipe(text: str) -> Inject:
    """A recipe of the user, recipe.yaml."""
    return file("recipe.yaml", text)


def text(content: bytes | str) -> Inject:
    """The calibration text."""
    return file("text.jsonl", content)


def two_shards_missing(place: Path) -> None:
    for shard in sorted((place / "shards").glob("model-*.safetensors"))[1:3]:
        shard.unlink()


def tensor_missing(place: Path) -> None:
    edit_tensors(place / "dense" / "model.safetensors", **{Q: None})


def not_a_number(place: Path) -> None:
    weight = torch.zeros(32, 32, dtype=torch.bfloat16)
    weight[1, 2:4] = float("nan")
    edit_tensors(place / "dense" / "model.safetensors", **{Q: weight})


def beyond_float16(place: Path) -> None:
    weight = torch.full((16, 32), 0.01, dtype=torch.bfloat16)
    weight[3, 5] = 1e5
    edit_tensors(place / "dense" / "model.safetensors", model__layers__1__self_attn__v_proj__weight=weight)
    recipe(f"{CHEAPEST}save: {{dtype: float16, format: plain}}\n")(place)


def one_norm_in_float32(place: Path) -> None:
    edit_tensors(place / "dense" / "model.safetensors", model__norm__weight=torch.ones(32))


def diffusion_pipeline(place: Path) -> None:
    (place / "dense" / "config.json").rename(place / "dense" / "model_index.json")


def adapter_only(place: Path) -> None:
    (place / "dense" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


def pickle_only(place: Path) -> None:
    """Whoever opens it makes the file `canary`."""
    (place / "dense" / "model.safetensors").unlink()
    payload = f"cpathlib\nPath\n(S{str(place / 'canary')!r}\ntR(dS'touch'\n.".encode()
    (place / "dense" / "pytorch_model.bin").write_bytes(payload)


def other_code(place: Path) -> None:
    """A model whose own Python makes the file `canary`."""
    canary = f"import pathlib\npathlib.Path({str(place / 'canary')!r}).touch()\n"
    (place / "dense" / "evil.py").write_text(canary)
    code = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}
    edit_json(place / "dense" / "config.json", auto_map=code, model_type="evil")


def second_checkpoint(place: Path) -> None:
    for each in (place / "shards").glob("model*"):
        shutil.copy(each, place / "dense")


def index_leaves_the_folder(place: Path) -> None:
    index = place / "shards" / INDEX
    shutil.copy(next((place / "shards").glob("model-*.safetensors")), place / "outside.safetensors")
    edit_json(index, weight_map={**json.loads(index.read_text())["weight_map"], Q: "../outside.safetensors"})


def link_leaves_the_folder(place: Path) -> None:
    weights = place / "dense" / "model.safetensors"
    weights.rename(place / "outside.safetensors")
    weights.symlink_to(place / "outside.safetensors")


def onnx_data_outside(place: Path) -> None:
    (place / "secret.bin").write_bytes(bytes(64))
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[16])
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../secret.bin"), ("offset", "0"), ("length", "64")):
        weight.external_data.add(key=key, value=value)
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [16])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["y"])], "g", [], [output], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    (place / "dense" / "model.onnx").write_bytes(model.SerializeToString())


def far_token(place: Path) -> None:
    """A token beyond the embedding's rows, in the tokenizer and in the text."""
    with_a_far_token(place / "dense")
    (place / "text.jsonl").write_text(json.dumps({"text": "the quick brown <far> fox " * 40}) + "\n")


def filled_output(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "thesis.txt").write_text("mine")


def output_is_a_file(place: Path) -> None:
    (place / "out").write_text("mine")


def search_file(place: Path) -> None:
    """A space of three formats."""
    formats = {f"int{bits}": [{"rtn": {"scheme": f"int{bits}_g16"}}] for bits in (8, 4, 2)}
    settings = {
        "calibration": {"samples": 4, "tokens": 32},
        "space": {"sites": formats},
        "judge": {"stages": [64, 128]},
        "optimizer": {"evopress": {"trials": 4, "offspring": 2}},
        "evaluate": {"perplexity": [{"source": "builtin:evaluation", "window": 32, "max_windows": 2}]},
    }
    (place / "search.yaml").write_text(json.dumps(settings))
