"""Tiny models whose linears hold codes, and their logits as a fresh process with stock transformers computes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmcompress.model.rotation import untie
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.rounded_inputs import fixed_scale
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.ranges import fit
from tests.families import tiny_model, tiny_tokens
from tests.warm_python import WarmPython

LOADER = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
found = {}
for name, (folder, dtypes) in json.loads(sys.argv[1]).items():
    ids = torch.load(folder + "/ids.pt")
    for dtype in dtypes:
        options = {"dtype": dtype, "attn_implementation": "eager", "output_loading_info": True}
        model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
        with torch.no_grad():
            logits = model.eval()(ids).logits
        torch.save(logits, f"{folder}/{dtype}.pt")
        found[f"{name} {dtype}"] = sorted(map(str, info["missing_keys"])) + sorted(map(str, info["unexpected_keys"]))
found["llmcompress"] = [name for name in sys.modules if name.startswith("llmcompress")]
print("\\n" + json.dumps(found))
"""


def quantized_model(family: str, schemes: Sequence[str], **config: Any) -> PreTrainedModel:
    """A tiny model with bfloat16 values in float32, each linear of its blocks rounded with the next of `schemes`."""
    model = tiny_model(family, dtype=torch.bfloat16)
    for name, value in config.items():
        setattr(model.config, name, value)
    rebuilt = type(model)(model.config).eval()
    rebuilt.load_state_dict(model.float().state_dict())
    rebuilt.tie_weights()
    quantize(rebuilt, schemes)
    return rebuilt


def quantize(model: nn.Module, schemes: Sequence[str]) -> None:
    """Round every linear inside a block (never a router) to codes, in place."""
    linears = [
        name
        for name, part in model.named_modules()
        if isinstance(part, (nn.Linear, Conv1D))
        and ".0." in name.replace(".1.", ".0.").replace(".2.", ".0.")
        and not name.endswith(".gate")
    ]
    for number, name in enumerate(linears):
        scheme, old = named_scheme(schemes[number % len(schemes)]), model.get_submodule(name)
        weight_OI = old.weight.detach().T if isinstance(old, Conv1D) else old.weight.detach()
        fitted = fit(weight_OI.float(), scheme.weights, scale_dtype=torch.bfloat16)
        bias_O = None if old.bias is None else old.bias.detach().clone()
        scale = torch.tensor([0.046875]) if scheme.activations == "tensor" else None
        if scheme.measures_inputs and scheme.activations == "group":
            scale = fixed_scale(torch.tensor(5.0), scheme)
        parent, _, leaf = name.rpartition(".")
        site = QuantLinear.from_fitted(scheme, round_to_codes(weight_OI.float(), fitted), fitted, bias_O, scale)
        setattr(model.get_submodule(parent), leaf, site)


def quantize_head(model: PreTrainedModel, name: str) -> None:
    """Round the head too, in place; a tied one gets a table of its own."""
    untie(model)
    scheme, head = named_scheme(name), model.get_output_embeddings()
    fitted = fit(head.weight.detach().float(), scheme.weights, scale_dtype=torch.bfloat16)
    codes_OI = round_to_codes(head.weight.detach().float(), fitted)
    model.set_output_embeddings(QuantLinear.from_fitted(scheme, codes_OI, fitted, None))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What the live model computes when cast the way loaders cast: rotary tables stay float32."""
    for part in model.modules():
        for tensor in [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
            if tensor.is_floating_point() and not any("inv_freq" in name for name in part._buffers):
                tensor.data = tensor.data.to(dtype)
    found: Tensor = model(ids).logits
    return found


def load_in_fresh_process(
    python: WarmPython, folders: dict[str, Path], families: dict[str, str], dtypes: dict[str, tuple[str, ...]]
) -> dict[str, list[str]]:
    """Load every folder with its dtypes in one process that knows nothing of ours; the keys that did not fit.

    Logits lie in `auto.pt` and `float32.pt` of each folder.
    """
    for name, folder in folders.items():
        torch.save(tiny_tokens(families[name]), folder / "ids.pt")
    done = python.run(LOADER, json.dumps({name: (str(folder), dtypes[name]) for name, folder in folders.items()}))
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found
