"""Round to a grid that the target holds, export, and let its own runtime say what it computes."""

from llmcompress import PerplexityTask, compress, evaluate, export

made = compress(
    "builtin:books-llama",
    {
        "calibration": {"samples": 16, "tokens": 128},
        "passes": [{"gptq": {"scheme": "int4_g32"}}],
        "save": {"dtype": "bfloat16"},
        "export": ["gguf"],
    },
    "out/w4",
    overwrite=True,
)
report = export("out/w4", "gguf", "out/gguf", overwrite=True)["gguf"]
print(f"{len(report.read_back)} tensors read back, {len(report.differing)} differ, {report.bytes:,} bytes")

text = PerplexityTask(source="builtin:evaluation", window=256, max_windows=4)
(here,) = made.evaluate(text).perplexities
(there,) = evaluate("out/gguf", text, runner="llama_cpp").perplexities
print(f"perplexity {here.perplexity:.3f} in PyTorch, {there.perplexity:.3f} in llama.cpp")
