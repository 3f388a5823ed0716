"""Names in recipes and on the command line → classes; a folder is scanned, so a new file is a new entry."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from llmcompress.errors import CompressError, ExitCode, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Every class registered by the modules below one package.

    The package is imported at the first look-up, not before: asking for `--help` must not import torch.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
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
                f"there is no {self.kind} called {name!r}",
                fix=did_you_mean(name, self),
                exit_code=ExitCode.USAGE,
            )
        return self._classes[name]

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
        root = importlib.import_module(self.package)
        for found in pkgutil.walk_packages(root.__path__, prefix=f"{self.package}."):
            importlib.import_module(found.name)
