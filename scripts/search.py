"""Search the best recipe for a model within limits; `llmcompress search` has more options."""

from __future__ import annotations

import click

from llmcompress.plan_search.searching import search


@click.command()
@click.argument("model")
@click.argument("space")
@click.argument("output")
@click.option("--bytes", "size", help="The most that the weight files may take, e.g. 60MB or 0.25x.")
@click.option("--workers", default=0, help="Processes that judge plans; 0: this one does.")
def main(model: str, space: str, output: str, size: str | None, workers: int) -> None:
    """Print the selected plan and the front."""
    found = search(model, space, output, limits={"bytes": size} if size else None, workers=workers, progress="bar")
    for number in found.front:
        each = found.trial(number)
        mark = "selected" if number == found.selected else ""
        print(f"{number:5d}  KL {each.loss:.4f}  {each.costs}  {mark}")


if __name__ == "__main__":
    main()
