"""The database of a study: SQLite on one host, PostgreSQL for many, or Optuna's gRPC proxy before it."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING

from filelock import FileLock

from llmcompress.errors import CompressError, ExitCode
from llmcompress.plan_search.library import optuna_library

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

RETRIES = 1
"""So often a trial is tried again after its worker died."""

HEARTBEAT_SECONDS, GRACE_SECONDS = 10, 60
"""A worker tells so often that it lives; a trial whose worker did not for so long is tried again."""


def storage_at(url: str) -> BaseStorage:
    """The storage of SQLite, PostgreSQL or a proxy.

    Raises: CompressError for an address that is none, and where the package that a proxy needs is not installed.
    """
    optuna = optuna_library()
    if url.startswith("grpc://"):
        return _proxy(url)
    waiting = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    storage: BaseStorage = optuna.storages.RDBStorage(
        url,
        engine_kwargs=waiting,
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=GRACE_SECONDS,
        heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
    )
    return storage


def _proxy(url: str) -> BaseStorage:
    host, _, port = url.removeprefix("grpc://").partition(":")
    if not host or not (port or "13000").isdecimal():
        what, fix = f"{url} is not the address of a proxy", "write it as grpc://HOST:PORT"
        raise CompressError("search.address", what, where="database", fix=fix, exit_code=ExitCode.USAGE)
    if find_spec("grpc") is None:
        what = "Optuna's gRPC proxy needs grpcio, which is not installed"
        raise CompressError("search.package", what, fix="pip install grpcio")
    proxy: BaseStorage = optuna_library().storages.GrpcStorageProxy(host=host, port=int(port or 13000))
    return proxy


def refuse_password(url: str) -> None:
    """Raises: CompressError for a URL that has one."""
    if re.match(r"[^/]*://[^/@]*:[^/@]*@", url):
        raise CompressError(
            "search.password",
            "the URL of the database has a password in it, which would be in files and lists of processes",
            fix="leave it out, and put it in ~/.pgpass or in PGPASSWORD",
            exit_code=ExitCode.USAGE,
        )


def no_study(url: str, name: str) -> CompressError:
    """The database has no study of that name."""
    return CompressError(
        "search.no-study",
        f"there is no study {name!r} in this database",
        where=url,
        fix="start the search first, or give its name with `study`",
        exit_code=ExitCode.USAGE,
    )


def one_at_a_time(url: str) -> AbstractContextManager[object]:
    """Held while the state of a trial changes. SQLite reads it and then writes, so that two could claim one trial."""
    path = url.removeprefix("sqlite:///")
    return FileLock(f"{path}.lock") if url.startswith("sqlite:///") else nullcontext()
