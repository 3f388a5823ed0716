"""A view of the model's config for one module, with some numbers of its own."""

from __future__ import annotations

from typing import Any, Self


class PrivateConfig:
    """Returns its own attributes, and for all others those of the shared config.

    Not a copy: later changes of the shared config, such as `set_attn_implementation`, must reach the module too.
    """

    def __init__(self, shared: Any) -> None:
        self._shared = shared

    @classmethod
    def over(cls, config: Any) -> Self:
        """A new one over a shared config, or one that says the same as another private one."""
        if not isinstance(config, PrivateConfig):
            return cls(config)
        again = cls(config._shared)
        vars(again).update(vars(config))
        return again

    def __getattr__(self, name: str) -> Any:
        if name == "_shared":  # asked before it is set, while being copied
            raise AttributeError(name)
        return getattr(self._shared, name)


def config_integers(config: Any) -> dict[str, int]:
    """The public integers of a config, shared or private."""
    shared = vars(config._shared) if isinstance(config, PrivateConfig) else {}
    both = {**shared, **vars(config)}
    return {name: value for name, value in both.items() if type(value) is int and not name.startswith("_")}
