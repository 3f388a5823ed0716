"""`llmcompress schema`: the JSON Schema of recipes, for editors."""

from __future__ import annotations

import click

from llmcompress.cli.output import print_json


@click.command(short_help="Print the JSON Schema of a recipe.")
def schema() -> None:
    """Print the JSON Schema of a recipe: every option of every pass, for completion in editors.

    \b
    Example:
      llmcompress schema > recipe.schema.json
      # first line of a recipe:  # yaml-language-server: $schema=recipe.schema.json
    """
    from llmcompress.recipe.catalogue import catalogue

    print_json(catalogue().schema)
