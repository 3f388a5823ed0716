"""Compares our TensorRT-LLM folders with those that NVIDIA ModelOpt writes: names, dtypes, shapes, bytes and configs.

    python evals/tensorrt_llm.py --environments FOLDER [--folders MODELOPT_FOLDERS] [--write]

ModelOpt quantizes tiny random models of every family in its own environment (`peers/modelopt_folder.py`). Each folder
is read into modules of ours (its codes, scales and input scales), exported by us, and the two folders are compared
bit for bit. Then the weights that we decode are compared with those ModelOpt computes with. Exit code 1 where anything
differs that is not named in `ALLOWED`. With `--write`, what was found goes to tests/exporters/modelopt_facts.json, so
that the tests hold our files against ModelOpt's without ModelOpt. TensorRT-LLM itself runs in neither.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from peers.venvs import run_in
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmcompress.evaluation.checkpoint_codes import CodedSite, codes_in
from llmcompress.exporters.base import EXPORTERS, Writing
from llmcompress.loading.tensors import Tensors
from llmcompress.model.skeleton import put_module
from llmcompress.modules.kv_cache import CodedAttention
from llmcompress.modules.quant_linear import QuantLinear, as_bits
from llmcompress.modules.scheme import Scheme
from llmcompress.storage.json_file import read_json

FACTS = Path(__file__).resolve().parent.parent / "tests" / "exporters" / "modelopt_facts.json"
ALLOWED = {
    "pre_quant_scale": "their smoothing factors, where ours are folded and 1",
    "weight_scale_2": "theirs is no power of two: inverted twice it may differ in the last bit",
    "input_scale": "the same, of NVFP4",
}
SAMPLE_ROWS = 2


@click.command()
@click.option(
    "--environments", type=click.Path(path_type=Path), help="Where the environment of ModelOpt is, or is made."
)
@click.option(
    "--folders", type=click.Path(path_type=Path), help="Folders of an earlier run of peers/modelopt_folder.py."
)
@click.option("--write", is_flag=True, help="Write tests/exporters/modelopt_facts.json.")
def main(environments: Path | None, folders: Path | None, write: bool) -> None:
    """Compare every folder."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        home = folders or Path(scratch)
        if environments is not None:
            for dtype, more in (("bfloat16", ()), ("float32", ("--family", "llama"))):
                run_in(
                    "modelopt", "modelopt_folder.py", [str(home / dtype), "--dtype", dtype, *more], folder=environments
                )
        faults, facts = [], dict[str, Any](tensors={}, config={}, samples={}, families=set())
        for folder in sorted(path for path in (home / "bfloat16").iterdir() if path.is_dir()):
            family, _, algorithm = folder.name.partition("-")
            found = compared(folder, Path(scratch))
            faults += [f"{folder.name}: {each}" for each in found]
            facts["families"].add(family)
            facts["tensors"].setdefault(algorithm, {})[family] = rules(folder)
            if family == "llama":
                facts["config"][algorithm] = configs(folder)
        for folder in sorted(path for path in (home / "float32").iterdir() if path.is_dir()):
            faults += [f"{folder.name}: {each}" for each in weights_apart(folder)]
            algorithm = folder.name.partition("-")[2]
            if algorithm not in ("MIXED", "FP8-kv"):
                facts["samples"][algorithm] = sample(folder)
    for fault in faults:
        click.echo(fault)
    click.echo(f"{len(facts['families'])} families, {len(facts['tensors'])} formats, {len(faults)} differences")
    if write:
        text = {**facts, "families": sorted(facts["families"]), "tensors": common(facts["tensors"])}
        FACTS.write_text(json.dumps(text, indent=1, sort_keys=True) + "\n")
    sys.exit(1 if faults else 0)


def compared(folder: Path, scratch: Path) -> list[str]:
    """What differs between ModelOpt's folder and the one that we write with its codes."""
    model = opened(folder)
    ours = scratch / f"ours-{folder.name}"
    exporter = EXPORTERS["tensorrt_llm"]()
    exporter.write(model, ours, Writing(torch.bfloat16))
    faults = []
    theirs, written = load_file(folder / "model.safetensors"), load_file(ours / "model.safetensors")
    for name in sorted(theirs.keys() | written.keys()):
        one, other = theirs.get(name), written.get(name)
        if one is None or other is None:
            faults.append(f"{name} is only in {'ours' if one is None else 'theirs'}")
        elif (one.dtype, one.shape) != (other.dtype, other.shape):
            faults.append(f"{name}: {one.dtype} {list(one.shape)}, ours {other.dtype} {list(other.shape)}")
        elif not torch.equal(as_bytes(one), as_bytes(other)) and not allowed(name, one, other):
            faults.append(f"{name}: other bytes")
    for file, part in (("hf_quant_config.json", "quantization"), ("config.json", "quantization_config")):
        wanted, found = read_json(folder / file)[part], read_json(ours / file)[part]
        faults += [
            f"{file}: {key} is {found.get(key)!r}, theirs {value!r}"
            for key, value in wanted.items()
            if key != "producer" and without_embedding(found.get(key)) != without_embedding(value)
        ]
    return faults


def as_bytes(tensor: Tensor) -> Tensor:
    """As it lies in the file."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def without_embedding(value: object) -> object:
    """ModelOpt names it among excluded modules unless its class is a family's own; it is never quantized."""
    return [each for each in value if each != "model.embed_tokens"] if isinstance(value, list) else value


def allowed(name: str, one: Tensor, other: Tensor) -> bool:
    """Whether a difference is explained."""
    leaf = name.rpartition(".")[2]
    return leaf in ALLOWED and (leaf == "pre_quant_scale" or bool((one / other - 1).abs().max() < 1e-6))


def opened(folder: Path) -> PreTrainedModel:
    """The stock model with ModelOpt's codes, scales and cache scales in modules of ours."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    stored, read = codes_in(folder), Tensors()
    dense = {each.name: read(each).float() for each in stored.dense}
    for site in stored.coded:
        assert isinstance(site, CodedSite)
        put_module(model, site.name, module_of(site, read, dense.pop(f"{site.name}.bias", None)))
    scales = {name: dense.pop(name) for name in list(dense) if name.endswith((".k_scale", ".v_scale"))}
    model.load_state_dict(dense, strict=False)
    model.tie_weights()
    for name in [each.removesuffix(".k_proj.k_scale") for each in scales if each.endswith("k_scale")]:
        attention = model.get_submodule(name)
        heads = (config.num_key_value_heads,) * 2
        wrapper = CodedAttention("fp8", "tensor", "past_key_values", heads, (config.head_dim,) * 2)
        wrapper.key_scale = scales[f"{name}.k_proj.k_scale"].reshape(1)
        wrapper.value_scale = scales[f"{name}.v_proj.v_scale"].reshape(1)
        wrapper.take(attention)
        put_module(model, name, wrapper)
    return model


def module_of(site: CodedSite, read: Tensors, bias: Tensor | None) -> QuantLinear:
    """Its codes, as our own passes would have made them."""
    found = {name: read(each) for name, each in site.tensors.items()}
    tensor = site.unpack(site, found)
    scheme = site.scheme or Scheme(tensor.grid)
    fixed, shared = found.get("input_scale"), tensor.shared_scale
    if fixed is not None:
        fixed = as_bits(1 / fixed.reshape(1)) if scheme.activations == "group" else fixed.reshape(1)
    bits = None if shared is None else as_bits(shared)
    return QuantLinear(scheme, tensor.codes, tensor.scale, tensor.zero_point, bias, fixed, bits)


def weights_apart(folder: Path) -> list[str]:
    """Where our decoder gives other weights than ModelOpt computes with, by more than float32 rounding.

    Of AWQ only matrices that are not merged: the others are smoothed and rounded again while ModelOpt exports. A weight
    halfway between two codes may go either way, so one in a thousand may be a step apart.
    """
    wanted = load_file(folder.with_name(f"{folder.name}.weights.safetensors"))
    read, faults = Tensors(), []
    for site in codes_in(folder).coded:
        assert isinstance(site, CodedSite)
        if "AWQ" in folder.name and site.name.rpartition(".")[2] not in ("o_proj", "down_proj"):
            continue
        found = {name: read(each) for name, each in site.tensors.items()}
        apart = (site.unpack(site, found).dense() - wanted[site.name]).abs() / wanted[site.name].abs().max()
        if (share := float((apart > 1e-6).float().mean())) > 1e-3:
            faults.append(f"{site.name}: {share:.1%} of the weights differ, the largest by {float(apart.max()):.2g}")
    return faults


def rules(folder: Path) -> dict[str, dict[str, Any]]:
    """Of every projection of block 1 (all are in one format there): part → dtype and shape in terms of O and I."""
    found: dict[str, dict[str, Any]] = {}
    tensors = load_file(folder / "model.safetensors")
    for site in codes_in(folder).coded:
        assert isinstance(site, CodedSite)
        if ".1." not in site.name:
            continue
        own = {name.rpartition(".")[2]: each for name, each in tensors.items() if name.rpartition(".")[0] == site.name}
        found[site.name.rpartition(".")[2]] = {
            part: [str(each.dtype).removeprefix("torch."), rule(tuple(each.shape), site.outputs, site.inputs)]
            for part, each in sorted(own.items())
        }
    return found


def rule(shape: tuple[int, ...], outputs: int, inputs: int) -> str:
    """`O/2×I`; sizes were chosen so that no two readings are possible within one matrix, or both are the same."""
    names = {"O": outputs, "I": inputs}
    if len(shape) == 1:
        return "I" if shape[0] == inputs and outputs != inputs else "O" if shape[0] == outputs else str(shape[0])
    return "×".join(
        name if size == names[name] else f"{name}/{names[name] // size}"
        for name, size in zip(("O", "I"), shape, strict=False)
    )


def common(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Families and projections with the same rules together."""
    return {algorithm: _grouped(families) for algorithm, families in tensors.items()}


def _grouped(families: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for family, projections in families.items():
        for projection, parts in projections.items():
            row = found.setdefault(json.dumps(parts), {"of": {}, "parts": parts})
            row["of"].setdefault(family, []).append(projection)
    return list(found.values())


def configs(folder: Path) -> dict[str, Any]:
    """What stands beside the tensors."""
    inline = read_json(folder / "config.json")["quantization_config"]
    return {"hf_quant_config": read_json(folder / "hf_quant_config.json")["quantization"], "inline": inline}


def sample(folder: Path) -> dict[str, Any]:
    """A few rows of one matrix as stored, and the weights that ModelOpt computes with there."""
    name = "model.layers.0.mlp.down_proj"
    tensors = load_file(folder / "model.safetensors")
    weights = load_file(folder.with_name(f"{folder.name}.weights.safetensors"))[name]
    own = {key.rpartition(".")[2]: each for key, each in tensors.items() if key.rpartition(".")[0] == name}
    rows = {
        part: each[: max(1, SAMPLE_ROWS * len(each) // len(weights))]
        for part, each in own.items()
        if each.dim() and part != "pre_quant_scale"
    }
    rows |= {part: each for part, each in own.items() if not each.dim()}
    return {**{part: packed(each) for part, each in rows.items()}, "weights": packed(weights[:SAMPLE_ROWS])}


def packed(tensor: Tensor) -> dict[str, Any]:
    """As JSON."""
    data = as_bytes(tensor).numpy().tobytes()
    kind = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": kind, "shape": list(tensor.shape), "bytes": base64.b64encode(data).decode()}


if __name__ == "__main__":
    main()
