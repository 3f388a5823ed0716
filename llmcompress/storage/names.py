"""The names of weight files."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

FILES = "llmcompress_files.json"
"""In an output folder: names and digests of the files that we wrote there. Whatever is not named is the user's."""

CARD = "README.md"
"""The model card: a text that people go on editing, so no digest of it counts."""
