"""The names of weight files."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

FILES = "llmcompress_files.json"
"""In an output folder: the names of the files that we wrote there. Whatever is not named is the user's."""
