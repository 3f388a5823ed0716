"""What stands for the database of a study is checked before it is used."""

from __future__ import annotations

import pytest

from llmcompress.errors import CompressError, ExitCode
from llmcompress.plan_search import database


@pytest.mark.parametrize("url", ["grpc://", "grpc://:13000", "grpc://host:port", "grpc://host:1e4"])
def test_what_is_no_address_of_a_proxy_is_refused(url: str) -> None:
    with pytest.raises(CompressError, match="grpc://HOST:PORT") as refused:
        database.storage_at(url)
    assert (refused.value.code, refused.value.exit_code) == ("search.address", ExitCode.USAGE)


def test_the_package_of_the_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "find_spec", lambda name: None)
    with pytest.raises(CompressError, match="pip install grpcio") as missing:
        database.storage_at("grpc://host")
    assert missing.value.code == "search.package"
