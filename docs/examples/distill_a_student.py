"""A student with fewer blocks learns the teacher's distribution: forward KL and the outputs of the last block."""

from llmcompress import compress

STUDENT = {"depth": {"count": 2}}
LESSON = {
    "distill": {
        "teacher": "original",
        "objective": {"kl": {}, "hidden_states": {"layers": "last", "factor": 0.1}},
        "training": {"steps": 24, "batch": 4, "learning_rate": 0.001},
    }
}
COMMON = {
    "calibration": {"source": "builtin:calibration", "samples": 32, "tokens": 64},
    "evaluate": {"perplexity": [{"source": "builtin:evaluation", "window": 256, "max_windows": 4}]},
}

before = compress("builtin:books-llama", {**COMMON, "passes": [STUDENT]})
after = compress("builtin:books-llama", {**COMMON, "passes": [STUDENT, LESSON]})
for name, made in (("removed", before), ("distilled", after)):
    (quality,) = made.report.quality
    print(f"{name}: perplexity {quality.compressed.perplexity:.1f}, dense {quality.dense.perplexity:.1f}")
