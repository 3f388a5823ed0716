"""`llmcompress speed`: tokens per second of one or several models, measured in turns."""

from __future__ import annotations

import click

from llmcompress.cli.early import refuse_missing_models
from llmcompress.cli.libraries import loading_libraries, quiet_libraries
from llmcompress.cli.output import device_option, json_option, print_json, print_tables


@click.command(short_help="Measure tokens per second, prefill and decode separately.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--against", metavar="OTHER", help="One more model, which the ratios are to. [default: the first MODEL]")
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
    against: str | None,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """Measure the speed of each MODEL: batch size 1, greedy decoding with a KV cache, after a warm-up.

    Several models are measured in turns, so that their ratios are reliable on a busy machine. A ratio is the median of
    all turns, with the lowest and the highest.

    \b
    Examples:
      llmcompress speed builtin:books-llama
      llmcompress speed out --against Qwen/Qwen3-0.6B --device cpu --json
    """
    quiet_libraries()
    from llmcompress.cli.tables import speed_tables
    from llmcompress.cli.terminal import TerminalProgress

    measured = tuple(dict.fromkeys([*models, against] if against else models))
    refuse_missing_models(*measured)
    with TerminalProgress() as progress:
        with loading_libraries(progress):
            from llmcompress import pipeline
            from llmcompress.evaluation.speed import speed_ratios
        progress.stage("measure speed", 0)
        results = pipeline.speed(
            measured,
            device=device,
            dtype=dtype,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
        )
    reference = results[against or models[0]]
    ratios = {name: speed_ratios(each, reference) for name, each in results.items() if each is not reference}
    if as_json:
        found = {name: result.model_dump(mode="json") for name, result in results.items()}
        told = {name: {key: each.model_dump() for key, each in ratio.items()} for name, ratio in ratios.items()}
        print_json({"models": found, "against": against, "ratios": told} if against else found)
    else:
        print_tables(*speed_tables(results, ratios))
