"""What weight files are called, wherever they are read, written or published."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
