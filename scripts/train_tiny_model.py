"""Train a small Llama-type language model from any text, on a laptop, in minutes to hours.

    python scripts/train_tiny_model.py book.txt more.jsonl --output my-model --minutes 30

The result is an ordinary Hugging Face folder. A killed run goes on with the same command and --resume.
"""

from __future__ import annotations

import copy
import json
import lzma
import math
import time
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

# B = windows, T = tokens, V = vocabulary
BOS, EOS = "<s>", "</s>"
STATE_FILE = "training-state.pt"
WARMUP_SHARE = 0.02
FILE = click.Path(exists=True, path_type=Path)


@click.command()
@click.argument("texts", nargs=-1, required=True, type=FILE)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--valid", type=FILE, help="Held-out text; default: the last 2 % of TEXTS.")
@click.option("--init", type=FILE, help="Start from this model and its tokenizer; the size options are then unused.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --output.")
@click.option("--minutes", type=float, help="Training time, resumed time counted in; the learning rate follows it.")
@click.option("--steps", type=int, help="Training steps, instead of --minutes.")
@click.option("--hidden", default=192, show_default=True)
@click.option("--layers", default=5, show_default=True)
@click.option("--ffn", default=512, show_default=True)
@click.option("--heads", default=6, show_default=True)
@click.option("--kv-heads", default=3, show_default=True)
@click.option("--vocab", default=2048, show_default=True)
@click.option("--window", default=512, show_default=True, help="Tokens per window with BOS; also the model's context.")
@click.option("--batch", default=8, show_default=True, help="Windows per step.")
@click.option("--rate", default=2e-3, show_default=True, help="Peak learning rate, then a cosine to zero.")
@click.option("--save-minutes", default=5.0, show_default=True, help="Minutes between checkpoints.")
@click.option("--compile", "compiled", is_flag=True, help="Use torch.compile: half a minute to start, then faster.")
@click.option("--bfloat16", is_flag=True, help="Multiply in bfloat16: 1.4 times as fast on a CPU with avx512_bf16.")
@click.option("--seed", default=1, show_default=True)
@click.option("--about", default="a text of the user's own", show_default=True, help="What TEXTS are, for the card.")
def main(
    texts: tuple[Path, ...],
    output: Path,
    valid: Path | None,
    init: Path | None,
    resume: bool,
    minutes: float | None,
    steps: int | None,
    hidden: int,
    layers: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    window: int,
    batch: int,
    rate: float,
    save_minutes: float,
    compiled: bool,
    bfloat16: bool,
    seed: int,
    about: str,
) -> None:
    """Train a small Llama-type model from TEXTS: .txt, .txt.xz, or .jsonl with one {"text": ...} per line."""
    if (minutes is None) == (steps is None):
        raise click.UsageError("give a budget: either --minutes or --steps")
    if resume and not (output / STATE_FILE).exists():
        raise click.UsageError(f"nothing to resume: {output} holds no {STATE_FILE}; start without --resume")
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output.mkdir(parents=True, exist_ok=True)

    source = output if resume else init
    documents = [document for path in texts for document in read_documents(path)]
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json")) if source else train_tokenizer(documents, vocab)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    if bos is None or eos is None:
        raise click.UsageError(f"the tokenizer of {source} has no {BOS} and {EOS}; use a model this program made")
    train_T = encode(tokenizer, documents, eos)
    if valid:
        valid_T = encode(tokenizer, read_documents(valid), eos)
    else:
        train_T, valid_T = train_T.split([len(train_T) - len(train_T) // 50, len(train_T) // 50])
    if len(train_T) < 2 * window:
        raise click.UsageError(f"{len(train_T)} training tokens are too few; windows of {window} need {2 * window}")

    if source:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)
    else:
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                hidden_size=hidden,
                num_hidden_layers=layers,
                intermediate_size=ffn,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                head_dim=hidden // heads,
                vocab_size=tokenizer.get_vocab_size(),
                max_position_embeddings=window,
                tie_word_embeddings=True,
                bos_token_id=bos,
                eos_token_id=eos,
                pad_token_id=eos,
            )
        ).to(device)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    state: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0}
    if resume:
        state = torch.load(output / STATE_FILE)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    click.echo(f"{model.num_parameters():,} parameters, {len(train_T):,} training tokens, on {device}", err=True)

    run = torch.compile(model) if compiled else model
    started, last_save = time.monotonic() - state["seconds"], state["seconds"]
    while True:
        state["seconds"] = time.monotonic() - started
        done = state["seconds"] / (60 * minutes) if minutes else state["step"] / (steps or 1)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min((done + 1e-4) / WARMUP_SHARE, 0.5 + 0.5 * math.cos(math.pi * done))
        ids_BT = training_windows(train_T, bos, window, batch, seed, state["step"]).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            loss = next_token_loss(run, ids_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state.update(step=state["step"] + 1, tokens=state["tokens"] + ids_BT.numel())

        if state["step"] % 100 == 0:
            speed, left = state["tokens"] / state["seconds"], state["seconds"] * (1 / done - 1) / 60
            click.echo(f"step {state['step']}  loss {loss:.3f}  {speed:,.0f} tokens/s  {left:.1f} min left", err=True)
        if state["seconds"] - last_save > 60 * save_minutes:
            save(model, tokenizer, optimizer, state, output, window)
            click.echo(f"saved; held-out perplexity {perplexity(model, valid_T, bos, window, first=100):.2f}", err=True)
            last_save = state["seconds"]

    save(model, tokenizer, optimizer, state, output, window)
    # the bfloat16 weights that were written are measured, not the float32 ones they were rounded from
    written = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).to(device)
    final = perplexity(written, valid_T, bos, window)
    write_card(
        output,
        {
            "parameters": written.num_parameters(),
            "steps": state["step"],
            "tokens": state["tokens"],
            "minutes": round(state["seconds"] / 60, 1),
            "held_out_perplexity": round(final, 3),
            "window": window,
            "bos": "first token of every window",
            "data": about,
            "started_from": init.name if init else "random weights",
        },
    )
    click.echo(f"held-out perplexity {final:.3f}", err=True)


def read_documents(path: Path) -> list[str]:
    """The texts of one file."""
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    if path.suffix != ".jsonl":
        return [text]
    # not splitlines(), which also cuts at separators that a JSON string may hold
    return [json.loads(line)["text"] for line in text.split("\n") if line.strip()]


def train_tokenizer(documents: list[str], vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str], eos: int, characters: int = 200_000) -> Tensor:
    """All documents as one row of tokens, each ended by EOS."""
    ids: list[int] = []
    for document in documents:
        # pieces bound the memory; a word cut in two costs an odd token each time
        pieces = [document[start : start + characters] for start in range(0, len(document), characters)]
        for encoded in tokenizer.encode_batch(pieces, add_special_tokens=False):
            ids.extend(encoded.ids)
        ids.append(eos)
    return torch.tensor(ids, dtype=torch.int32)


def training_windows(tokens_T: Tensor, bos: int, window: int, batch: int, seed: int, step: int) -> Tensor:
    """The windows of one step: a function of the step alone, so a resumed run sees what an unbroken one would."""
    body = window - 1
    per_epoch = (len(tokens_T) - body) // body
    rows = []
    for index in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(index, per_epoch)
        # every epoch has its own order and cuts the text at other places
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        offset = int(torch.randint(body, (1,), generator=generator))
        start = offset + body * int(torch.randperm(per_epoch, generator=generator)[place])
        rows.append(tokens_T[start : start + body])
    return pad(torch.stack(rows).long(), (1, 0), value=bos)


def next_token_loss(model: Any, ids_BT: Tensor) -> Tensor:
    """Mean cross-entropy of every token but the first."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    return cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens_T: Tensor, bos: int, window: int, first: int | None = None) -> float:
    """Perplexity per token over non-overlapping windows of BOS and text; a tail shorter than a window is left out."""
    body = min(window - 1, len(tokens_T))
    rows_BT = tokens_T[: len(tokens_T) // body * body].view(-1, body)[:first]
    ids_BT = pad(rows_BT.long(), (1, 0), value=bos)
    losses = [next_token_loss(model, ids.to(model.device)).item() * len(ids) for ids in ids_BT.split(16)]
    return math.exp(sum(losses) / len(ids_BT))


def save(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    output: Path,
    window: int,
) -> None:
    """Write the Hugging Face folder, and beside it what --resume needs."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(output)
    # transformers 4 reads rope_theta and torch_dtype, transformers 5 rope_parameters and dtype
    config = json.loads((output / "config.json").read_text())
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    config |= {
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "max_position_embeddings": window,
    }
    write_json(output / "config.json", config)
    write_json(output / "generation_config.json", {name: config[name] for name in config if name.endswith("_token_id")})
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    tokenizer.save(str(output / "tokenizer.json"))
    write_json(
        output / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "model_max_length": window,
            "clean_up_tokenization_spaces": False,
            # without this transformers 4 adds token_type_ids, which generate() refuses
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )
    torch.save({**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, output / "partial.pt")
    (output / "partial.pt").replace(output / STATE_FILE)


def write_card(output: Path, facts: dict[str, Any]) -> None:
    """Write training.json and README.md: what this model is and how well it predicts text it never saw."""
    write_json(output / "training.json", facts)
    (output / "README.md").write_text(f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# {output.resolve().name}

A Llama-type causal language model of {facts["parameters"]:,} parameters, trained from {facts["data"]}.

- Started from {facts["started_from"]}; {facts["tokens"]:,} tokens in {facts["steps"]:,} steps.
- Perplexity on held-out text: **{facts["held_out_perplexity"]:.2f}** per token. Windows of {facts["window"]} tokens
  that do not overlap, BOS the first token of each; the stored bfloat16 weights computed in float32.
- Give it BOS in front of every text, as in training; the tokenizer does.
- For experiments, demonstrations and tests: it knows no facts and follows no instructions.
""")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that reads and diffs well."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
