"""Calibrate on your own conversations, evaluate on your own text: what the model is used for decides what it may lose."""

from llmcompress import PerplexityTask, compress

questions = ["What does the cat do?", "Who lives in the forest?", "Why was the king angry?", "Where did they sail?"]
stories = [
    f"{question} Once upon a time there was an answer, and it was told by the fire. " * 8 for question in questions
]

made = compress(
    "builtin:books-llama",
    {"passes": [{"gptq": {"scheme": "int4_g32"}}]},
    calibration={"source": "builtin:calibration", "samples": 8, "tokens": 128},
)
books = PerplexityTask(source="builtin:evaluation", window=256, max_windows=2)
(measured,) = made.evaluate(books).perplexities
print(f"calibrated on books: perplexity {measured.perplexity:.2f}")

other = compress("builtin:books-llama", {"passes": [{"gptq": {"scheme": "int4_g32"}}]}, calibration=stories)
(measured,) = other.evaluate(books).perplexities
print(f"calibrated on {len(stories)} texts of our own: {measured.perplexity:.2f}")
print(made.generate("Once upon a time", max_new_tokens=12))
