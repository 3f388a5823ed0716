"""`llmcompress speed`: tokens per second of one or several models, measured in turns."""

from __future__ import annotations

import click

from llmcompress.cli.output import device_option, json_option, print_json, print_tables, quiet_libraries


@click.command(short_help="Measure tokens per second, prefill and decode separately.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, show_default=True)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="How many timed repeats to take the median of.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="auto: float32 on a CPU, the checkpoint's dtype elsewhere.",
)
@device_option
@json_option
def speed(
    models: tuple[str, ...],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """Measure each MODEL: one text at a time, greedy, with a key-value cache, after a warm-up.

    Several models are measured in turns, so that their ratios hold on a machine that does other things as well; ratios
    are to the first.

    \b
    Examples:
      llmcompress speed builtin:books-llama
      llmcompress speed Qwen/Qwen3-0.6B out --device cpu --json
    """
    quiet_libraries()
    from llmcompress.cli.tables import speed_table
    from llmcompress.cli.terminal import TerminalProgress

    with TerminalProgress() as progress:
        progress.stage("starting", 0)
        from llmcompress import pipeline

        results = pipeline.speed(
            models,
            device=device,
            dtype=dtype,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
        )
    if as_json:
        print_json({name: result.model_dump(mode="json") for name, result in results.items()})
    else:
        print_tables(speed_table(results))
