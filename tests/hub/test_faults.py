"""Whatever the Hub or the network does: exit code 5, the server's own words, what to do; and the same again goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcompress import load, verify
from llmcompress.compressed_model import CompressedModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.hub_upload import push
from llmcompress.publishing.destinations import HubRepository
from tests.hub.server import TOKEN, Handler, HubDouble

NAME = "me/tiny-w4"
WANTED = HubRepository(repository=NAME)
COMMIT, STORE = f"/api/models/{NAME}/commit/main", "/lfs/"


def refused(made: CompressedModel, *, wanted: HubRepository = WANTED) -> CompressError:
    assert made.folder is not None
    with pytest.raises(CompressError) as found:
        push([made.folder], wanted)
    assert found.value.exit_code is ExitCode.HUB and found.value.fix
    assert TOKEN not in str(found.value)
    return found.value


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "advice"),
    [
        ("GET", "whoami", 401, "hub.login", "hf auth login"),
        ("POST", "repos/create", 403, "hub.forbidden", "token"),
        ("PUT", STORE, 403, "hub.forbidden", "token"),
        ("POST", "/commit/", 409, "hub.conflict", "push again"),
        ("POST", "/commit/", 413, "hub.too-large", "max_shard_size"),
    ],
)
def test_a_refusal_is_told_with_the_servers_reason(
    hub: HubDouble, made: CompressedModel, method: str, path: str, status: int, code: str, advice: str
) -> None:
    hub.fail(method, path, status, message="Private storage quota exceeded")
    error = refused(made)
    assert error.code == code and advice in error.fix
    assert str(status) in error.what and "Private storage quota exceeded" in error.what
    assert made.push(NAME).changed


def test_the_file_stores_own_words_are_passed_on(hub: HubDouble, made: CompressedModel) -> None:
    def answer(handler: Handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send(
            403, b"<?xml version='1.0'?><Error><Code>X</Code><Message>Request has expired</Message></Error>", {}
        )

    hub.act("PUT", STORE, answer)
    assert refused(made).what.endswith("403 for me/tiny-w4: Request has expired")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "whoami"),
        ("POST", "repos/create"),
        ("POST", "preupload"),
        ("POST", "objects/batch"),
        ("POST", "/commit/"),
    ],
)
def test_429_is_asked_again_when_the_server_says(
    hub: HubDouble, made: CompressedModel, waits: list[float], method: str, path: str
) -> None:
    hub.fail(method, path, 429, times=2, Retry_After="7")
    assert made.push(NAME).changed
    assert len(waits) == 2 and all(7 <= wait <= 8 for wait in waits)  # huggingface_hub 2 adds a second


def test_a_hub_that_stays_busy_is_asked_five_times(hub: HubDouble, made: CompressedModel, waits: list[float]) -> None:
    hub.fail("POST", "/commit/", 429, times=99, message="slow down", Retry_After="3")
    error = refused(made)
    assert error.code == "hub.rate-limit" and "slow down" in error.what
    assert waits == [3.0] * 4 and hub.called("POST", "/commit/") == 5


def test_a_wait_of_hours_is_left_to_the_user(hub: HubDouble, made: CompressedModel, waits: list[float]) -> None:
    hub.fail("GET", "whoami", 429, Retry_After="86400")
    refused(made)
    assert not waits


@pytest.mark.parametrize(("method", "path"), [("PUT", STORE), ("POST", "/commit/")])
def test_503_is_asked_again_ever_more_slowly(
    hub: HubDouble, made: CompressedModel, waits: list[float], method: str, path: str
) -> None:
    hub.fail(method, path, 503, times=3)
    assert made.push(NAME).changed
    assert waits == [1.0, 2.0, 4.0]


def test_a_change_by_another_is_not_overwritten(hub: HubDouble, made: CompressedModel) -> None:
    made.push(NAME)
    repo = hub.repos[NAME]
    repo.commit({**repo.files, "config.json": b"{}"}, "main")

    def other(handler: Handler) -> None:
        repo.commit({**repo.files, "config.json": b'{"theirs": 1}'}, "main")
        handler.handle_one("POST")

    hub.act("POST", "/commit/", other)
    error = refused(made)
    assert error.code == "hub.changed" and repo.branches["main"][:12] in error.what and "pull request" in error.fix
    assert repo.files["config.json"] == b'{"theirs": 1}'


def test_a_commit_whose_answer_was_lost_is_not_made_twice(
    hub: HubDouble, made: CompressedModel, waits: list[float]
) -> None:
    def lost(handler: Handler) -> None:
        handler.send = lambda *_: None  # type: ignore[method-assign]
        handler.handle_one("POST")
        del handler.send
        handler.refuse(502, "bad gateway", {})

    hub.act("POST", "/commit/", lost)
    done = made.push(NAME)
    assert done.commit == hub.repos[NAME].branches["main"] and len(hub.repos[NAME].commits) == 2 and waits == [1.0]


@pytest.mark.parametrize(("method", "path"), [("PUT", STORE), ("POST", "/commit/"), ("POST", "preupload")])
def test_a_connection_that_dies_is_told_and_the_same_again_sends_the_rest(
    hub: HubDouble, made: CompressedModel, waits: list[float], method: str, path: str
) -> None:
    hub.drop(method, path, times=99)
    error = refused(made)
    assert error.code == "hub.network" and "push again" in error.fix and "nothing was published" in error.saved
    assert hub.repos[NAME].files.keys() == {".gitattributes"}
    hub.faults.clear()
    stored = len(hub.stored)
    before = hub.called("PUT", STORE)
    assert made.push(NAME).changed
    assert hub.called("PUT", STORE) - before == 1 - stored, "what is in the store already is not sent again"


def test_a_truncated_download_is_no_model(hub: HubDouble, made: CompressedModel, waits: list[float]) -> None:
    made.push(NAME)

    def half(handler: Handler) -> None:
        content = hub.repos[NAME].files["model.safetensors"]
        handler.send_response(200)
        for name, value in {"Content-Length": len(content), "ETag": '"x"', "X-Repo-Commit": "c" * 40}.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2])
        handler.close_connection = True

    for _ in range(9):
        hub.act("GET", r"resolve/.*/model\.safetensors", half)
    with pytest.raises(CompressError) as broken:
        load(NAME)
    assert broken.value.exit_code is ExitCode.HUB and broken.value.code == "hub.network"
    hub.faults.clear()
    assert load(NAME).model


@pytest.mark.parametrize("status", [None, 403, 500])
def test_a_download_that_fails_is_not_told_as_a_push(
    hub: HubDouble, made: CompressedModel, waits: list[float], status: int | None
) -> None:
    made.push(NAME)
    if status is None:
        hub.drop("GET", r"resolve/", times=99)
    else:
        hub.fail("GET", r"resolve/", status, times=99)
    with pytest.raises(CompressError) as refused:
        verify(NAME)
    assert refused.value.exit_code is ExitCode.HUB and NAME in refused.value.what
    assert not any(word in str(refused.value) for word in ("push", "publish", "write"))


@pytest.mark.parametrize("create_pr", [False, True])
def test_a_token_that_can_only_read_is_found_before_anything_is_created(
    hub: HubDouble, made: CompressedModel, create_pr: bool
) -> None:
    hub.users[TOKEN]["auth"]["accessToken"]["role"] = "read"
    error = refused(made, wanted=HubRepository(repository=NAME, create_pr=create_pr))
    assert error.code == "hub.forbidden" and "can only read" in error.what and NAME not in hub.repos


def test_without_a_login_nothing_is_asked(
    hub: HubDouble, made: CompressedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert refused(made).code == "hub.login" and not hub.requests


def test_a_namespace_of_others_is_told(hub: HubDouble, made: CompressedModel) -> None:
    hub.users[TOKEN]["orgs"] = [{"name": "lab", "roleInOrg": "read"}, {"name": "team", "roleInOrg": "contributor"}]
    error = refused(made, wanted=HubRepository(repository="google/gemma"))
    assert "may not publish under google" in error.what and "me and lab and team" in error.fix
    assert "may only read in lab" in refused(made, wanted=HubRepository(repository="lab/x")).what
    assert made.push("team/x").changed


@pytest.mark.parametrize(
    ("rights", "may"), [(["repo.content.read"], False), (["repo.content.read", "repo.write"], True)]
)
def test_a_fine_grained_token_needs_the_right_to_write(
    hub: HubDouble, made: CompressedModel, rights: list[str], may: bool
) -> None:
    scoped = [{"entity": {"type": "user", "name": "me"}, "permissions": rights}]
    hub.users[TOKEN]["auth"]["accessToken"] |= {"role": "fineGrained", "fineGrained": {"global": [], "scoped": scoped}}
    if may:
        assert made.push(NAME).changed
    else:
        assert "no right to write" in refused(made).what
