"""Print the model map as JSON; `llmcompress inspect` shows it as tables."""

from __future__ import annotations

import json

import click

from llmcompress import inspect


@click.command()
@click.argument("model")
def main(model: str) -> None:
    """Print blocks, sites, shared inputs, folds and refusals of MODEL."""
    print(json.dumps(inspect(model), indent=2))


if __name__ == "__main__":
    main()
