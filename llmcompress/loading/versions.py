"""Which transformers is installed: the one place that asks, for the few things that its majors name differently."""

import transformers

TRANSFORMERS_MAJOR = int(transformers.__version__.partition(".")[0])
