"""`llmcompress speed`: what one or several models cost on this device, measured in turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from llmcompress.cli.early import refuse_missing_models
from llmcompress.cli.libraries import loading_libraries, quiet_libraries
from llmcompress.cli.output import device_option, json_option, print_json, print_tables

if TYPE_CHECKING:
    from llmcompress.evaluation.device.cost import Skipped


class Counts(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """`1,4,16`: one or several numbers, at least 1."""

    name = "n,n,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Numbers from text."""
        try:
            found = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            found = ()
        if not found or min(found) < 1:
            self.fail(f"{value!r} is not a list of numbers such as 1,4,16", param, ctx)
        return found


@click.command(short_help="Measure tokens per second, memory and energy.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--against", metavar="OTHER", help="One more model, which the ratios are to. [default: the first MODEL]")
@click.option("--batch", type=Counts(), default="1", show_default=True, help="Batch sizes: 1,4,16.")
@click.option(
    "--context", type=Counts(), default="128", show_default=True, help="Prompt tokens per sequence: 128,1024."
)
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, show_default=True)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="How many timed repeats to take the median of.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads; they are pinned to as many cores where the system can do that. [default: all cores]",
)
@click.option(
    "--runner",
    "runners",
    multiple=True,
    metavar="NAME",
    help="What runs the models; once for all, or once for each MODEL in order, OTHER last. [default: torch]",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="auto: float32 on a CPU, the checkpoint's dtype elsewhere.",
)
@click.option(
    "--skip",
    type=click.Choice(["memory", "energy", "limits"]),
    multiple=True,
    help="Leave out peak memory (a fresh process per model), energy, or the limits of the machine. Repeatable.",
)
@device_option
@json_option
def speed(
    models: tuple[str, ...],
    against: str | None,
    batch: tuple[int, ...],
    context: tuple[int, ...],
    new_tokens: int,
    repeats: int,
    threads: int | None,
    runners: tuple[str, ...],
    dtype: str,
    skip: tuple[Skipped, ...],
    device: str,
    as_json: bool,
) -> None:
    """Measure what each MODEL costs on this device: prefill and decode tokens/s, time to first token, peak memory,
    bytes read per token against the measured memory bandwidth, and joules per token where a counter can be read.

    Greedy decoding with a KV cache, after a warm-up. Several models are measured in turns, so that their ratios are
    reliable on a busy machine. A ratio is the median of all turns, with the lowest and the highest.

    \b
    Examples:
      llmcompress speed builtin:books-llama
      llmcompress speed out --against Qwen/Qwen3-0.6B --batch 1,4 --context 128,1024
      llmcompress speed out --threads 1 --skip memory --json
    """
    quiet_libraries()
    from llmcompress.cli.cost_tables import cost_tables
    from llmcompress.cli.terminal import TerminalProgress

    measured = (*models, against) if against else models
    refuse_missing_models(*measured)
    with TerminalProgress() as progress:
        with loading_libraries(progress):
            from llmcompress import pipeline
        progress.stage("measure cost", 0)
        table = pipeline.speed(
            measured,
            device=device,
            dtype=dtype,
            runner=runners or "torch",
            batch=batch,
            context=context,
            new_tokens=new_tokens,
            repeats=repeats,
            threads=threads,
            skip=skip,
        )
    names = [row.model for row in table.rows]
    reference = names[0] if not against else against if against in names else names[-1]  # in two runtimes: renamed
    if as_json:
        print_json(
            {
                "rows": [row.model_dump(mode="json") for row in table.rows],
                "limits": [each.model_dump(mode="json") for each in table.limits],
                "reference": reference,
                "ratios": [
                    {
                        "model": row.model,
                        "batch": row.batch,
                        "context": row.context,
                        "prefill": prefill.model_dump(),
                        "decode": decode.model_dump(),
                    }
                    for row, prefill, decode in table.ratios(reference)
                ],
            }
        )
    else:
        print_tables(*cost_tables(table, reference))
