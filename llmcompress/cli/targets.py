"""`llmcompress targets`: which target of an export holds which scheme, from the exporters' own answers."""

from __future__ import annotations

import click

from llmcompress.cli.libraries import quiet_libraries
from llmcompress.cli.output import json_option, print_json, print_tables

SCHEMES = (
    "int8_channel",
    "int8_g32",
    "int6_g32",
    "int5_g32",
    "int4_g128",
    "int4_g64",
    "int4_g32",
    "int4_g16",
    "int4_g32_asym",
    "int3_g64",
    "int2_g64",
    "ternary_g64",
    *(f"q{bits}_k" for bits in range(6, 1, -1)),
    "fp8_channel",
    "mxfp4",
    "nvfp4",
    "nf4_g64",
    "int8_channel_a8token",
    "int8_channel_a8tensor",
)


@click.command()
@click.argument("schemes", metavar="[SCHEME]…", nargs=-1)
@click.option("--inputs", type=click.IntRange(min=1), default=1024, show_default=True, help="Inputs of the linear.")
@json_option
def targets(schemes: tuple[str, ...], inputs: int, as_json: bool) -> None:
    """Show which target of `llmcompress export` holds which scheme.

    exact: codes and scales are stored as they are. converted: stored in another form. refused: with the reason, and the
    nearest scheme that is held.

    \b
    Examples:
      llmcompress targets
      llmcompress targets int4_g48 int3_channel --inputs 576
    """
    quiet_libraries()
    from llmcompress.cli.export_tables import targets_table
    from llmcompress.exporters.targets import answers_of_targets

    found = answers_of_targets(schemes or SCHEMES, inputs)
    if as_json:
        print_json([row.model_dump(mode="json") for row in found])
    else:
        print_tables(targets_table(found))
