"""The recipe: strict YAML ⇄ frozen data."""

from llmcompress.calibration.settings import Calibration
from llmcompress.evaluation.settings import PerplexityTask
from llmcompress.recipe.model import Recipe, Save
from llmcompress.recipe.order import check_order, check_sites
from llmcompress.recipe.reading import json_schema, parse_recipe, read_recipe

__all__ = [
    "Calibration",
    "PerplexityTask",
    "Recipe",
    "Save",
    "check_order",
    "check_sites",
    "json_schema",
    "parse_recipe",
    "read_recipe",
]
