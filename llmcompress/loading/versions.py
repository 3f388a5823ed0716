"""The installed version of transformers, for the few names that differ between its major versions."""

import transformers

TRANSFORMERS_MAJOR = int(transformers.__version__.partition(".")[0])
