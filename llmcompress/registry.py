"""Names in recipes and on the command line → classes; folders are scanned, so a new file is a new entry."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from llmcompress.errors import CompressError, ExitCode, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Every class registered by one module, or by the modules below one package.

    It is imported at the first look-up, not before: asking for `--help` must not import torch.
    """

    def __init__(self, kind: str, place: str) -> None:
        self.kind, self.place = kind, place
        self._classes: dict[str, type[T]] = {}
        self._scanned = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that files the class under `name`."""

        def file_under_name(cls: type[T]) -> type[T]:
            assert name not in self._classes, f"two {self.kind}s are called {name!r}"
            self._classes[name] = cls
            return cls

        return file_under_name

    def __getitem__(self, name: str) -> type[T]:
        """The class called `name`.

        Raises: CompressError naming the nearest known name.
        """
        self._scan()
        if name not in self._classes:
            raise CompressError(
                f"{self.kind}.unknown",
                f"unknown {self.kind} {name!r}",
                fix=did_you_mean(name, self),
                exit_code=ExitCode.USAGE,
            )
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        self._scan()
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        self._scan()
        return iter(sorted(self._classes))

    def name_of(self, cls: type[T]) -> str:
        """The name a class was registered under."""
        self._scan()
        return next(name for name, known in self._classes.items() if known is cls)

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        root = importlib.import_module(self.place)
        for found in pkgutil.walk_packages(getattr(root, "__path__", ()), prefix=f"{self.place}."):
            importlib.import_module(found.name)
