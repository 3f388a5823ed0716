"""One recipe: remove a block, train what is left against the dense model, then round it to 4 bits."""

from llmcompress import compress

RECIPE = {
    "calibration": {"source": "builtin:calibration", "samples": 64, "tokens": 128},
    "passes": [
        {"depth": {"count": 1}},
        {"recover": {"rank": 8, "teacher": "original", "training": {"steps": 30, "batch": 8, "learning_rate": 0.002}}},
        {"gptq": {"scheme": "int4_g32"}},
    ],
    "evaluate": {"perplexity": [{"source": "builtin:evaluation", "window": 256, "max_windows": 4}]},
}
without = {**RECIPE, "passes": [RECIPE["passes"][0], RECIPE["passes"][2]]}

pruned = compress("builtin:books-llama", without)
healed = compress("builtin:books-llama", RECIPE)
print(f"dense {pruned.report.quality[0].dense.perplexity:.1f}")
print(f"pruned and rounded {pruned.report.quality[0].compressed.perplexity:.1f}")
print(f"the same, healed in between {healed.report.quality[0].compressed.perplexity:.1f}")
