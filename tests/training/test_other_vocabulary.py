"""A teacher with another tokenizer: aligned by characters, equal to an ordinary teacher where the tokenizers are."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from llmcompress.training.data.batch import Batch, Sample, padded
from llmcompress.training.features import Wanted
from llmcompress.training.objectives.jsd import JSD
from llmcompress.training.objectives.kl import KL
from llmcompress.training.objectives.universal_logit import UniversalLogit
from llmcompress.training.other_vocabulary import Mapping, OtherVocabularyTeacher
from llmcompress.training.step import Step
from llmcompress.training.targets import MatchedTokens, OtherVocabulary
from llmcompress.training.teacher import ModelTeacher
from llmcompress.training.text_alignment import Pair
from tests.tiny_folder import tiny_tokenizer

CPU = torch.device("cpu")
TEXT = "the lazy café dog learns: naïve 狐 jumps over the the model"


def mine() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), bos_token="<s>", eos_token="</s>")


def theirs() -> PreTrainedTokenizerFast:
    """Other merges, other numbers, other names of special tokens, no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["over the moon the café learns naïve lazy models jumping"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<pad>")


def model(vocabulary: int, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=vocabulary, max_position_embeddings=128)).eval()
    for each in made.parameters():
        torch.nn.init.normal_(each, std=0.3)
    return made


def a_batch(*texts: str) -> Batch:
    """Between BOS and EOS, of different lengths."""
    tokenizer = mine()
    samples = [[0, *tokenizer(text, add_special_tokens=False)["input_ids"], 1] for text in texts]
    return padded([Sample(torch.tensor(ids)) for ids in samples])


def test_both_have_read_the_same_characters_at_every_pair_of_places() -> None:
    one, other = mine(), theirs()
    words = one(TEXT, add_special_tokens=False)["input_ids"]
    found = Pair(one, other).aligned([0, *words, 1, *words[:5]])
    assert len(found.places) == len(words) + 7
    text = [token for token in found.ids if token != other.eos_token_id]
    assert other.decode(text) == TEXT + one.decode(words[:5])
    assert found.places[0] is None, "the other one has no BOS"
    pairs = 0
    for count in range(1, len(words) + 1):
        place = found.places[count]
        read = one.decode(words[:count])
        ends = [number for number in range(len(text)) if other.decode(text[: number + 1]) == read]
        assert place == (ends[-1] if ends and "\ufffd" not in read else None), read
        pairs += place is not None
    assert pairs > 15
    end = found.places[len(words) + 1]
    assert end is not None and found.ids[end] == other.eos_token_id


def test_matched_tokens_are_spelled_alike_and_some_are_left_over() -> None:
    one, other = mine(), theirs()
    here, there = Pair(one, other).matched()
    assert len(here) > 200 and len(set(here)) == len(set(there)) == len(here) < min(len(one), len(other))
    for mine_id, theirs_id in zip(here, there, strict=True):
        special = mine_id == one.eos_token_id and theirs_id == other.eos_token_id
        assert special or one.decode([mine_id]) == other.decode([theirs_id])


@pytest.mark.parametrize("objective", [KL(), KL(direction="reverse", weight=0.5), JSD(temperature=2.0)], ids=repr)
def test_with_the_same_tokenizer_matched_tokens_teach_what_all_do(objective: KL | JSD) -> None:
    """All but one token are matched: the last one and the padding tokens are one event."""
    student, other, batch = model(280), model(280, seed=1), a_batch(TEXT, "the fox")
    pair = Pair(mine(), mine())
    temperature = objective.temperature
    teachers = (
        ModelTeacher(other, CPU),
        OtherVocabularyTeacher(ModelTeacher(other, CPU), pair, "matched", temperature=temperature),
    )
    losses = [Step(student, objective, teacher, None, list(student.parameters()))(batch, 1) for teacher in teachers]
    # a character of several bytes is a position at which nothing is compared
    inside = _unknown(teachers[1], batch)
    assert 0 < inside < 10
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=0.3)
    plain = a_batch("the fox", "jumps over the lazy dog")
    losses = [Step(student, objective, teacher, None, list(student.parameters()))(plain, 1) for teacher in teachers]
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=2e-3)


def _unknown(teacher: OtherVocabularyTeacher, batch: Batch) -> int:
    said = teacher.predictions(batch, Wanted())
    rows = said.rows(said.values_RX)
    assert isinstance(rows, MatchedTokens | OtherVocabulary)
    return int((~rows.known_R[batch.targets_BT.flatten() != -100]).sum())


def test_sorted_probabilities_are_compared_where_both_have_read_the_same() -> None:
    student, other, batch = model(280), model(300, seed=1), a_batch(TEXT, "the fox")
    pair = Pair(mine(), theirs())
    teacher = OtherVocabularyTeacher(ModelTeacher(other, CPU), pair, "sorted")
    found = Step(student, UniversalLogit(weight=1.0), teacher, None, list(student.parameters()))(batch, 1)
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, targets in zip(batch.ids_BT.tolist(), batch.targets_BT.tolist(), strict=True):
            kept = [token for token, target in zip(ids, [0, *targets], strict=False) if target != -100]
            aligned = pair.aligned(kept)
            q = student(torch.tensor([kept])).logits[0].softmax(-1)
            p = other(torch.tensor([aligned.ids])).logits[0].softmax(-1)
            for position in range(len(kept) - 1):
                count += 1
                place = aligned.places[position]
                if place is not None:
                    one = functional.pad(q[position].sort(descending=True).values, (0, 20))
                    total += float((one - p[place].sort(descending=True).values).abs().sum())
    assert float(found.detach()) == pytest.approx(total / count, rel=1e-5)


def test_sorted_probabilities_of_equal_models_do_not_differ() -> None:
    student, batch = model(280), a_batch("the fox")
    loss = Step(student, UniversalLogit(weight=1.0), ModelTeacher(model(280), CPU), None, list(student.parameters()))
    assert float(loss(batch, 1).detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("mapping", ["sorted", "matched"])
def test_what_is_beyond_the_teachers_longest_text_teaches_nothing(mapping: Mapping) -> None:
    other = model(300, seed=1)
    other.config.max_position_embeddings = 6
    teacher = OtherVocabularyTeacher(ModelTeacher(other, CPU), Pair(mine(), theirs()), mapping)
    batch = a_batch("the lazy dog jumps over the model")
    assert _unknown(teacher, batch) >= batch.predicted - 8
