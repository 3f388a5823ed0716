from __future__ import annotations

import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmcompress.calibration import hub_datasets
from llmcompress.calibration.data import CalibrationData, calibration_windows
from llmcompress.calibration.generate import self_generated_text
from llmcompress.calibration.hub_datasets import _articles
from llmcompress.calibration.packing import sections
from llmcompress.calibration.settings import Calibration
from llmcompress.calibration.sources import TextSource, overlap_warning, paragraph_hashes, read_texts
from llmcompress.errors import CompressError, ExitCode
from tests.tiny_text import byte_tokenizer, tiny_llama, word_tokenizer

LINES = [f"This is sentence number {number} of this short text." for number in range(40)]
TEXT = "\n\n".join(LINES)


def windows(
    path: Path | str, tokenizer=None, *, max_positions=None, seed=0, model=None, held_out=0, **options
) -> CalibrationData:
    settings = Calibration(**{"source": str(path), "samples": 4, "tokens": 16, "min_tokens": 1, **options})
    tokenizer = tokenizer or byte_tokenizer()
    return calibration_windows(
        settings, tokenizer, max_positions=max_positions, seed=seed, given=model, held_out=held_out
    )


def refused(*arguments, **options) -> CompressError:
    with pytest.raises(CompressError) as caught:
        windows(*arguments, **options)
    return caught.value


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# windows


def test_windows_are_consecutive_pieces_of_shuffled_documents_joined_by_eos(tmp_path):
    file, tokenizer = jsonl(tmp_path / "a.jsonl", [{"text": line} for line in LINES]), byte_tokenizer()
    order = list(LINES)
    random.Random(7).shuffle(order)
    stream = [token for line in order for token in [*tokenizer(line)["input_ids"], tokenizer.eos_token_id]]
    data = windows(file, seed=7)
    assert data.windows_NT.flatten().tolist() == stream[: 4 * 16]
    assert data.windows_NT.shape == (4, 16)
    assert not data.bos


def test_held_out_windows_follow_the_measured_ones_which_stay_the_same(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"text": line} for line in LINES])
    plain, more, data = windows(file), windows(file, samples=6), windows(file, held_out=2)
    assert plain.held_out_NT is None and data.held_out_NT is not None
    assert torch.equal(data.windows_NT, plain.windows_NT)
    assert torch.equal(torch.cat([data.windows_NT, data.held_out_NT]), more.windows_NT)


def test_a_text_without_enough_windows_is_all_measured_and_none_held_out(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"text": LINES[0]}])
    data = windows(file, samples=50, held_out=2)
    assert len(data.windows_NT) > 1 and data.held_out_NT is None
    assert data.warnings == windows(file, samples=50).warnings


def test_self_holds_out_texts_that_it_does_not_measure():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    plain, data = (windows("self", tokenizer, model=model, held_out=count) for count in (0, 2))
    assert torch.equal(plain.windows_NT, data.windows_NT) and data.held_out_NT is not None
    assert data.held_out_NT.shape == (2, 16) and not torch.equal(data.held_out_NT, data.windows_NT[:2])


def test_each_window_starts_with_bos_exactly_when_the_tokenizer_adds_one(tmp_path):
    file, tokenizer = jsonl(tmp_path / "a.jsonl", [{"text": line} for line in LINES]), byte_tokenizer(bos_habit=True)
    order = list(LINES)
    random.Random(0).shuffle(order)
    stream = [token for line in order for token in [*tokenizer(line)["input_ids"][1:], 0]]
    data = windows(file, tokenizer)
    assert data.bos
    assert data.windows_NT[:, 0].tolist() == [0] * 4
    assert data.windows_NT[:, 1:].flatten().tolist() == stream[: 4 * 15]


def test_without_eos_and_bos_nothing_is_put_between_documents(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"text": "abc"}] * 10)
    data = windows(file, byte_tokenizer(bos=False, eos=False), tokens=15, samples=2)
    assert byte_tokenizer().decode(data.windows_NT.flatten()) == "abc" * 10


def test_same_seed_same_windows_and_another_seed_others(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(TEXT)
    assert torch.equal(windows(file, seed=3).windows_NT, windows(file, seed=3).windows_NT)
    assert not torch.equal(windows(file, seed=3).windows_NT, windows(file, seed=4).windows_NT)


def test_sections_hold_the_whole_text_and_are_of_about_the_size_asked_for():
    for text in (TEXT, TEXT.replace("\n\n", "\n"), TEXT.replace("\n\n", " "), "x" * 1000):
        parts = list(sections(text, 100))
        assert all(100 <= len(part) <= 200 for part in parts)
        assert "".join("".join(parts).split()) == "".join(text.split())


def test_the_bundled_text_fills_windows_without_a_network():
    data = windows("builtin:calibration", tokens=64, samples=32)
    assert data.windows_NT.shape == (32, 64)
    assert data.source == "builtin:calibration"


def test_the_two_bundled_texts_do_not_overlap():
    texts = [read_texts(TextSource(f"builtin:{name}")).documents for name in ("calibration", "evaluation")]
    assert not paragraph_hashes(texts[0]) & paragraph_hashes(texts[1])
    assert all(len(text[0].encode()) >= 20_000 for text in texts)


# sources


def write_csv(path: Path) -> None:
    path.write_text("id,text\n" + "".join(f'{n},"{line}, ""quoted"""\n' for n, line in enumerate(LINES)))


def write_parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": range(len(LINES)), "text": LINES}), path)


WRITERS = {
    "a.txt": lambda path: path.write_text(TEXT),
    "a.txt.xz": lambda path: path.write_bytes(lzma.compress(TEXT.encode())),
    "a.jsonl": lambda path: jsonl(path, [{"id": 1, "text": line} for line in LINES]),
    "strings.jsonl": lambda path: jsonl(path, LINES),
    "a.json": lambda path: path.write_text(json.dumps([{"content": line} for line in LINES])),
    "a.csv": write_csv,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_local_file_is_read(tmp_path, name):
    WRITERS[name](tmp_path / name)
    texts = read_texts(TextSource(str(tmp_path / name)))
    read = "\n\n".join(texts.documents)
    assert texts.name == name, "reports must not carry paths"
    assert read.replace(', "quoted"', "") == TEXT
    assert windows(tmp_path / name).windows_NT.shape == (4, 16)


def test_a_folder_of_parquet_files_is_read_as_a_dataset(tmp_path):
    write_parquet(tmp_path / "train.parquet")
    assert list(read_texts(TextSource(str(tmp_path))).documents) == LINES
    assert refused(tmp_path, split="nope").code == "data.split"


def test_wikitext_articles_join_to_what_all_rows_join_to():
    rows = ["", " = One = \n", "", " text \n", " = = Part = = \n", " more \n", " = Two = \n", " end \n"]
    articles = [text for _, text in _articles(rows)]
    assert "\n\n".join(articles) == "\n\n".join(rows)
    assert len(articles) == 3
    assert articles[1].startswith(" = One = ") and "Part" in articles[1]


def test_fingerprint_follows_the_content_and_not_the_file(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(TEXT)
    (tmp_path / "c.txt").write_text(TEXT + ".")
    prints = [read_texts(TextSource(str(tmp_path / name))).fingerprint for name in ("a.txt", "b.txt", "c.txt")]
    assert prints[0] == prints[1] != prints[2]


# chat

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}</s>"
CHAT = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Good day"}]
SHAREGPT = [{"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "Good day"}]
WRITTEN = "[user]Hello there[assistant]Good day</s>"


@pytest.mark.parametrize(("column", "messages"), [("messages", CHAT), ("conversations", SHAREGPT)])
def test_messages_go_through_the_chat_template(tmp_path, column, messages):
    file, tokenizer = jsonl(tmp_path / "c.jsonl", [{column: messages}] * 9), byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    data = windows(file, tokenizer, tokens=20, samples=5)
    assert tokenizer.decode(data.windows_NT.flatten()).startswith(WRITTEN * 2), "and no second </s> is added"


def test_a_template_that_writes_its_own_bos_does_not_double_the_one_of_the_windows(tmp_path):
    file, tokenizer = jsonl(tmp_path / "c.jsonl", [{"messages": CHAT}] * 9), byte_tokenizer(bos_habit=True)
    tokenizer.chat_template = "<s>" + TEMPLATE
    data = windows(file, tokenizer, tokens=21, samples=5)
    stream = [*tokenizer(WRITTEN, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id] * 9
    assert data.windows_NT[:, 0].tolist() == [tokenizer.bos_token_id] * 5
    assert data.windows_NT[:, 1:].flatten().tolist() == stream[: 5 * 20]


def test_a_template_file_serves_where_the_tokenizer_has_none(tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    file = jsonl(tmp_path / "c.jsonl", [{"messages": CHAT}] * 9)
    data = windows(file, chat_template=str(tmp_path / "t.jinja"))
    assert byte_tokenizer().decode(data.windows_NT.flatten()).startswith(WRITTEN)


def test_a22_messages_without_a_template_are_refused_naming_both_ways_out(tmp_path):
    file = jsonl(tmp_path / "c.jsonl", [{"messages": CHAT}] * 9)
    error = refused(file)
    assert error.code == "data.no-chat-template"
    assert "chat_template" in error.fix and "format: text" in error.fix
    assert "Hello there\n\nGood day" in byte_tokenizer().decode(windows(file, format="text").windows_NT.flatten())


def test_a_conversation_the_template_refuses_is_named_or_skipped_and_counted(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + TEMPLATE
    )
    file = jsonl(tmp_path / "c.jsonl", [{"messages": CHAT}, {"messages": CHAT[::-1]}, {"messages": CHAT}])
    assert "conversation 2" in refused(file, tokenizer).what
    data = windows(file, tokenizer, skip_bad_rows=True)
    assert data.skipped_rows == 1
    assert any("1 rows" in warning for warning in data.warnings)


def test_prompt_and_completion_are_put_together(tmp_path):
    file = jsonl(tmp_path / "p.jsonl", [{"prompt": "Question? ", "completion": "Answer."}] * 9)
    assert byte_tokenizer().decode(windows(file).windows_NT.flatten()).startswith("Question? Answer.</s>")


# faults


def test_d1_empty_sources_are_refused_with_exit_3(tmp_path):
    for name, content in [("e.txt", ""), ("e.txt", "\n \n"), ("e.jsonl", ""), ("e.csv", ""), ("e.json", "[]")]:
        (tmp_path / name).write_text(content)
        error = refused(tmp_path / name)
        assert (error.code, error.exit_code) == ("data.empty", ExitCode.REFUSED)
        assert "no usable samples" in error.what


def test_d2_all_samples_too_short_shows_a_histogram_and_the_option(tmp_path):
    file = jsonl(tmp_path / "s.jsonl", [{"text": "x" * length} for length in [1, 1, 3, 5, 6]])
    error = refused(file, min_tokens=10)
    assert error.code == "data.too-short"
    assert "1 tokens: 2 samples, 2-3: 1, 4-7: 2" in error.what
    assert "min_tokens" in error.fix and "6" in error.fix


def test_short_samples_among_others_are_left_out_and_counted(tmp_path):
    file = jsonl(tmp_path / "s.jsonl", [{"text": "x" * 5}] * 3 + [{"text": "y" * 30}] * 9)
    data = windows(file, min_tokens=10, samples=50)
    assert data.dropped_short == 3
    assert "x" not in byte_tokenizer().decode(data.windows_NT.flatten())


def test_d3_fewer_windows_than_asked_are_a_warning_with_both_numbers(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 40)
    data = windows(tmp_path / "a.txt", samples=8)
    assert len(data.windows_NT) == 2
    assert any("only 2 of the 8 windows" in warning for warning in data.warnings)


def test_d3_not_one_full_window_is_refused_with_the_largest_length_that_works(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 40)
    for tokenizer in (byte_tokenizer(), byte_tokenizer(bos_habit=True)):
        error = refused(tmp_path / "a.txt", tokenizer, tokens=64)
        works = int(error.fix.split("`tokens` to ")[1].split()[0])
        assert len(windows(tmp_path / "a.txt", tokenizer, tokens=works).windows_NT) == 1
        assert refused(tmp_path / "a.txt", tokenizer, tokens=works + 1).code == "data.too-little"


def test_d4_invalid_json_names_the_line_and_is_skipped_only_when_asked(tmp_path):
    good = json.dumps({"text": "x" * 100}).encode()
    file = tmp_path / "b.jsonl"
    file.write_bytes(good + b'\n\n{"text": oops}\n' + good + b"\n[1]\n")
    error = refused(file)
    assert error.code == "data.bad-row"
    assert "line 3" in error.what and "column 10" in error.what
    assert "skip_bad_rows" in error.fix
    data = windows(file, skip_bad_rows=True)
    assert data.skipped_rows == 2
    assert any("2 rows" in warning for warning in data.warnings)


@pytest.mark.parametrize("content", [b'{"id": 3}', b'{"text": null}', b'{"text": 5}', b'{"text": {"a": 1}}', b"7"])
def test_d4_rows_of_the_wrong_shape_name_their_line(tmp_path, content):
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n' + content + b"\n")
    assert "line 2" in refused(tmp_path / "b.jsonl").what


def test_d4_messages_of_the_wrong_shape_name_row_and_message(tmp_path):
    file = jsonl(tmp_path / "b.jsonl", [{"messages": CHAT}, {"messages": [CHAT[0], {"speaker": "me"}]}])
    assert "line 2: message 2" in refused(file).what


def test_d4_bom_and_crlf_change_nothing(tmp_path):
    for name, content in [("t.txt", TEXT), ("t.jsonl", json.dumps({"text": "x"}) + "\n"), ("t.csv", "text\nx\n")]:
        (tmp_path / name).write_bytes(content.encode())
        plain = read_texts(TextSource(str(tmp_path / name)))
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
        assert read_texts(TextSource(str(tmp_path / name))) == plain


def test_d4_latin1_is_recognised_with_line_and_byte(tmp_path):
    (tmp_path / "l.txt").write_bytes("one\ntwo caf\xe9\n".encode("latin-1"))
    error = refused(tmp_path / "l.txt")
    assert error.code == "data.encoding"
    assert "line 2, byte 8" in error.what and "'é'" in error.what
    assert "iconv" in error.fix
    (tmp_path / "l.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    assert "line 2: not UTF-8 at byte 14" in refused(tmp_path / "l.jsonl").what


def test_d4_csv_rows_with_too_many_fields_name_their_line(tmp_path):
    (tmp_path / "b.csv").write_text('text,n\n"two\nlines",1\na,2,3\n' + "x" * 90 + ",4\n")
    assert "line 4" in refused(tmp_path / "b.csv").what
    assert windows(tmp_path / "b.csv", skip_bad_rows=True).skipped_rows == 1


def test_broken_files_are_refused_by_name(tmp_path):
    for name, content in [("b.parquet", b"no"), ("b.txt.xz", b"no"), ("b.json", b"[1,"), ("b.csv", b'text\n"open')]:
        (tmp_path / name).write_bytes(content)
        assert name in refused(tmp_path / name).what
    (tmp_path / "b.pdf").write_bytes(b"no")
    assert refused(tmp_path / "b.pdf").code == "data.file-type"
    assert refused(tmp_path / "missing.txt").code == "data.not-found"
    assert "builtin:calibration" in refused("builtin:nope").fix


def test_d5_wrong_columns_show_the_columns_found_and_the_option(tmp_path):
    file = jsonl(tmp_path / "w.jsonl", [{"title": "t", "body": "b" * 100}])
    error = refused(file)
    assert error.code == "data.columns"
    assert "title, body" in error.what and "column" in error.fix
    assert "'txt'" in refused(file, column="txt").what
    assert windows(file, column="body").windows_NT.shape == (4, 16)


def test_d6_windows_longer_than_the_model_are_cut_with_a_warning(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    data = windows(tmp_path / "a.txt", tokens=100, max_positions=32)
    assert data.windows_NT.shape == (4, 32)
    assert any("100 to 32" in warning for warning in data.warnings)


def test_d7_overlap_is_found_by_paragraph_whatever_the_spacing(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    data = windows(tmp_path / "a.txt", samples=200)
    shared = LINES[3].replace(" ", "  ")
    warning = overlap_warning(
        data.paragraphs, paragraph_hashes([f"{shared}\n{'new ' * 20}"]), calibration_name="a.txt", evaluation_name="b"
    )
    assert warning and "1 of 2 paragraphs of b" in warning
    other = paragraph_hashes(["another text of more than forty characters, truly"])
    assert overlap_warning(data.paragraphs, other, calibration_name="a.txt", evaluation_name="b") is None


def test_d8_a_tokenizer_that_does_not_fit_the_text_is_a_warning(tmp_path):
    (tmp_path / "a.txt").write_text("good words and <unk> ones " * 20)
    fits = word_tokenizer(["good", "words", "and", "ones"])
    assert not any("unknown" in warning for warning in windows(tmp_path / "a.txt", fits).warnings)
    assert any("unknown" in w for w in windows(tmp_path / "a.txt", word_tokenizer(["good", "words"])).warnings)


def test_d9_an_uncached_dataset_offline_fails_at_once_and_offers_the_bundled_text(tmp_path):
    program = (
        "import time; from llmcompress.calibration.sources import TextSource, read_texts; start = time.monotonic()\n"
        "try: read_texts(TextSource('wikitext2'))\n"
        "except Exception as error: print(error, int(error.exit_code), time.monotonic() - start < 5)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "data.offline" in done.stdout and "builtin:calibration" in done.stdout
    assert done.stdout.strip().endswith(f"{int(ExitCode.HUB)} True")


def test_an_unresolvable_hub_counts_as_offline_unless_a_proxy_resolves_it(monkeypatch):
    def no_name(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(hub_datasets.socket, "getaddrinfo", no_name)
    monkeypatch.setattr(hub_datasets, "getproxies", dict)
    assert not hub_datasets.hub_reachable()
    monkeypatch.setattr(hub_datasets, "getproxies", lambda: {"https": "a proxy"})
    assert hub_datasets.hub_reachable()


def test_a_large_dataset_is_read_only_as_far_as_needed(monkeypatch):
    taken = []

    def endless(alias, part, *, streaming, where):
        assert (alias.path, alias.config, part.split, streaming) == ("allenai/c4", "en", "train", True)
        while True:
            taken.append(1)
            yield {"text": LINES[0], "url": ""}

    monkeypatch.setattr(hub_datasets, "hub_reachable", lambda: True)
    monkeypatch.setattr(hub_datasets, "_load", endless)
    assert windows("c4").windows_NT.shape == (4, 16)
    assert len(taken) * len(LINES[0]) < 4 * 16 * 8 + len(LINES[0])
    with pytest.raises(CompressError, match=r"max_windows"):
        read_texts(TextSource("c4"))


def test_a_connection_lost_while_reading_is_an_error_of_the_hub(monkeypatch):
    def lost(*_, **__):
        yield {"text": LINES[0]}
        raise TimeoutError("the connection was lost")

    monkeypatch.setattr(hub_datasets, "hub_reachable", lambda: True)
    monkeypatch.setattr(hub_datasets, "_load", lost)
    error = refused("some/dataset")
    assert (error.code, error.exit_code) == ("data.hub", ExitCode.HUB)


def test_b11_a_dataset_with_a_script_of_its_own_names_the_jsonl_way(tmp_path):
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text("raise SystemExit('this was run')")
    error = refused(folder)
    assert error.code == "data.script"
    assert ".jsonl" in error.fix


# text of the model itself


def test_self_needs_no_data_and_is_the_same_for_the_same_seed():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    first = windows("self", tokenizer, model=model)
    assert first.windows_NT.shape == (4, 16)
    assert torch.equal(first.windows_NT, windows("self", tokenizer, model=model, batch=3).windows_NT)
    assert not torch.equal(first.windows_NT, windows("self", tokenizer, model=model, seed=1).windows_NT)
    assert first.fingerprint == windows("self", tokenizer, model=model).fingerprint


def test_self_begins_with_an_ordinary_token_and_goes_on_greedily():
    model, tokenizer = tiny_llama(), byte_tokenizer(bos_habit=True)
    text = self_generated_text(model, tokenizer, samples=6, tokens=12, seed=0)
    assert text[:, 0].tolist() == [0] * 6
    assert (text[:, 1] > 1).all()
    for row in text:
        for position in range(2, 5):
            if tokenizer.eos_token_id not in row[:position]:
                assert row[position] == model(input_ids=row[None, :position]).logits[0, -1].argmax()


def test_self_samples_follow_the_model_with_and_without_a_cache():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    cached = self_generated_text(model, tokenizer, samples=3, tokens=24, seed=5)
    forward = model.forward
    model.forward = lambda input_ids, **_: type("Output", (), {"logits": forward(input_ids=input_ids).logits})()
    assert torch.equal(cached, self_generated_text(model, tokenizer, samples=3, tokens=24, seed=5))


def test_self_without_a_model_and_with_broken_logits_are_refused():
    assert refused("self").code == "data.self"
    model = tiny_llama()
    model.lm_head.weight.data.fill_(float("nan"))
    assert refused("self", model=model).code == "numerics.not-finite"
