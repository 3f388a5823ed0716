"""The proof that a saved model loads: a fresh process opens it as its users will, and its numbers are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from llmcompress.errors import CompressError
from llmcompress.loading.config import read_config
from llmcompress.loading.plugin import METHOD
from llmcompress.records.export_report import EXPORT_REPORT, ExportReport, RuntimeProof
from llmcompress.records.verification import Check
from llmcompress.reopening import reopen
from llmcompress.storage.json_file import read_json
from llmcompress.verification.stored import is_for_transformers

FreshProcess = Callable[[str, Sequence[str]], str]
"""Program and arguments → what it wrote to its standard output."""

_ROUNDING = 0.02
"""Largest difference ÷ largest logit that rounding of dequantized weights explains."""
_SAME_PERPLEXITY = 1e-3

LOAD = """
import json, sys, torch
from safetensors.torch import save_file
folder, found, ours = sys.argv[1:]
if ours == "1":
    import llmcompress
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained(folder)
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
config = model.config.get_text_config()
ids = torch.arange(48)[None] * 7919 % config.vocab_size
with torch.no_grad():
    logits = model.eval()(input_ids=ids).logits
save_file({"ids": ids, "logits": logits.float().contiguous()}, found)
wrong = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
print(json.dumps({"dtype": str(model.dtype).removeprefix("torch."), **wrong}))
"""

RUN = """
import sys
from llmcompress.verification.reloading import perplexity_again
print(perplexity_again(sys.argv[1]))
"""


def in_fresh_process(program: str, arguments: Sequence[str]) -> str:
    """Run a Python program offline, without the login of this process.

    Raises: CompressError with its last line, when it fails.
    """
    secret = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY"}
    environment = {name: value for name, value in os.environ.items() if name not in secret}
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-P", "-c", program, *arguments]
    done = subprocess.run(command, env={**environment, **quiet}, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        what, fix = (
            f"a fresh process cannot load it: {said[-1][:300]}",
            "install what it names, or get the folder again",
        )
        code = "verify.package" if said[-1].startswith(("ImportError", "ModuleNotFoundError")) else "verify.reload"
        raise CompressError(code, what, fix=fix)
    return done.stdout


def logits(folder: Path, fresh: FreshProcess) -> Check:
    """What a fresh process computes, against the stored codes; of other formats, against the export report."""
    try:
        return _reloaded(folder, fresh)
    except CompressError as problem:
        if problem.code != "verify.package":
            raise
        return Check(name="reload", result="skipped", found=problem.what)


def _reloaded(folder: Path, fresh: FreshProcess) -> Check:
    if (folder / EXPORT_REPORT).is_file():
        exported = ExportReport.model_validate(read_json(folder / EXPORT_REPORT, code="report.unreadable"))
        if exported.not_run is not None:
            return Check(name="reload", result="skipped", found=f"it cannot be run here: {exported.not_run}")
    if is_for_transformers(folder):
        return _of_transformers(folder, fresh)
    report = ExportReport.model_validate(read_json(folder / EXPORT_REPORT, code="report.unreadable"))
    if report.runtime is None:
        why = f": {report.not_run}" if report.not_run else ""
        return Check(name="reload", result="skipped", found=f"{report.target} was not run when it was exported{why}")
    return _of_runtime(folder, report.runtime, fresh)


def perplexity_again(folder: str) -> float:
    """What the export report measured, by the target's own runtime."""
    from llmcompress.evaluation.settings.perplexity import PerplexityTask
    from llmcompress.evaluation.texts import evaluation_text
    from llmcompress.exporters.base import EXPORTERS
    from llmcompress.loading.tokenizer import read_tokenizer

    place = Path(folder)
    report = ExportReport.model_validate(read_json(place / EXPORT_REPORT, code="report.unreadable"))
    assert report.runtime is not None
    config, _ = read_config(place, may_be_quantized=True)
    kind = EXPORTERS[report.target]().runner()
    with kind.open(folder, device=torch.device("cpu"), dtype=torch.float32) as runner, torch.inference_mode():
        windows = -(-report.runtime.tokens // max(1, report.runtime.window - 1))
        task = PerplexityTask(
            source=report.runtime.text, window=report.runtime.window, max_windows=windows, bos="never"
        )
        text = evaluation_text(task, read_tokenizer(place, config), runner.max_positions)
        nats, tokens = 0.0, 0
        for window in text.windows:
            scores_PV = runner.logits(window[None])[0, :-1].float().cpu().log_softmax(-1)
            nats -= float(scores_PV.gather(-1, window[1:, None].long()).sum(dtype=torch.float64))
            tokens += len(window) - 1
    return float(torch.tensor(nats / tokens, dtype=torch.float64).exp())


def _of_transformers(folder: Path, fresh: FreshProcess) -> Check:
    config, _ = read_config(folder, may_be_quantized=True)
    quantization = getattr(config, "quantization_config", None)
    needs_us = isinstance(quantization, dict) and quantization.get("quant_method") == METHOD
    with tempfile.TemporaryDirectory(prefix="llmcompress-") as scratch:
        found = Path(scratch) / "logits.safetensors"
        told = json.loads(fresh(LOAD, [str(folder), str(found), str(int(needs_us))]).splitlines()[-1])
        theirs = load_file(found)
    wrong = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in told[key]]
    if wrong:
        what = f"{len(wrong)} tensors are missing, unexpected or of another shape in a fresh process"
        return Check(name="reload", result="failed", found=what, where=tuple(wrong[:12]))
    by = "stock transformers" if not needs_us else "transformers with llmcompress"
    return _compared(theirs["logits"], _ours(folder, theirs["ids"], told["dtype"]), by)


@torch.no_grad()
def _ours(folder: Path, ids_BT: Tensor, dtype: str) -> Tensor:
    """The logits of the stored codes, in the dtype that the fresh process computed in."""
    model = reopen(str(folder)).model
    for part in model.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if tensor.is_floating_point() and "inv_freq" not in name:  # rotary tables stay float32, as in loaders
                tensor.data = tensor.data.to(getattr(torch, dtype))
    found: Tensor = model.eval()(input_ids=ids_BT).logits.float()
    return found


def _compared(theirs: Tensor, ours: Tensor, by: str) -> Check:
    if not bool(torch.isfinite(theirs).all()):
        return Check(name="reload", result="failed", found=f"{by} computes NaN or Inf")
    largest, scale = float((theirs - ours).abs().max()), float(ours.abs().max())
    if torch.equal(theirs, ours):
        return Check(name="reload", result="ok", found=f"{by} in a fresh process computes the same logits, bit for bit")
    said = f"logits of {by} in a fresh process differ by at most {largest:.2g}, of {scale:.3g}"
    return Check(name="reload", result="ok" if largest <= _ROUNDING * scale else "failed", found=said)


def _of_runtime(folder: Path, proof: RuntimeProof, fresh: FreshProcess) -> Check:
    found, wanted = float(fresh(RUN, [str(folder)]).splitlines()[-1]), proof.perplexity_runtime
    said = f"{proof.runtime} in a fresh process: perplexity {found:.4f} on {proof.text}, {wanted:.4f} when exported"
    same = abs(found - wanted) <= _SAME_PERPLEXITY * wanted
    return Check(name="reload", result="ok" if same else "failed", found=said)
