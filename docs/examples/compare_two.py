"""Two compressed models beside their dense one: what each costs, with intervals, as one HTML file."""

from llmcompress import PerplexityTask, compare, compress, write_report

DENSE = "builtin:books-llama"  # or "Qwen/Qwen3-0.6B"
for name in ("rtn", "gptq"):
    recipe = {"passes": [{name: {"scheme": "int3_g32"}}], "evaluate": {}}
    compress(DENSE, recipe, f"out/{name}", calibration={"samples": 16, "tokens": 128}, overwrite=True)

text = PerplexityTask(source="builtin:evaluation", window=256, max_windows=6)
found = compare(DENSE, ["out/rtn", "out/gptq"], [text])
for each in found.evaluations:
    (quality,) = each.quality
    assert quality.divergence is not None
    kl = quality.divergence.kl
    print(f"{each.model}: perplexity ×{quality.ratio:.4f}, KL {kl.mean:.5f} ({kl.low:.5f} to {kl.high:.5f})")
print(write_report(found, "out/report") / "report.html")
