"""A config.json that remembers which of its keys were read.

What a config.json says and nobody reads may still change the logits. A family's `variant` and `geometry` are given this
mapping instead of the plain one, so that afterwards every key is known to be read or unread (`recipes.trust.keys`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from smoothquant.errors import CheckpointError


class Config(Mapping[str, Any]):
    """The keys and values of a config.json. An object within it comes back as a Config too.

    content: what the file says. read: paths of the keys that were asked for, as in ("hidden_size",) and
    ("rope_scaling", "factor"). All configs that are made of one another share it.

    To take all keys at once, as in `{**config}`, would count them all as read: it raises CheckpointError. Use
    `defaulting` and `replacing` instead.
    """

    def __init__(
        self,
        content: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any] | None = None,
        read: set[tuple[str, ...]] | None = None,
        path: tuple[str, ...] = (),
    ) -> None:
        self.content, self._defaults, self._path = content, defaults or {}, path
        self.read: set[tuple[str, ...]] = set() if read is None else read

    def __getitem__(self, key: str) -> Any:
        self.read.add((*self._path, key))
        value = self.content[key] if key in self.content else self._defaults[key]
        if isinstance(value, Mapping) and not isinstance(value, Config):
            return Config(value, read=self.read, path=(*self._path, key))
        return value

    def __contains__(self, key: object) -> bool:
        self.read.add((*self._path, str(key)))
        return key in self.content or key in self._defaults

    def __len__(self) -> int:
        return len(self.content.keys() | self._defaults.keys())

    def __iter__(self) -> Iterator[str]:
        raise CheckpointError(
            "a family's geometry reads all keys of config.json at once",
            expected="config.get(KEY), config[KEY] or KEY in config, so that the keys that nobody reads are known",
            do="write config.defaulting({...}) for {**defaults, **config}, config.replacing({...}) for {**config, ...}",
        )

    def defaulting(self, defaults: Mapping[str, Any]) -> Config:
        """The same keys, with values for those that are absent."""
        return Config(self.content, defaults={**self._defaults, **defaults}, read=self.read, path=self._path)

    def replacing(self, values: Mapping[str, Any]) -> Config:
        """The same keys, some with other values; what the file says there then stays unread."""
        return _Replaced(self, values)


class _Replaced(Config):
    """A Config with some values of ours."""

    def __init__(self, below: Config, values: Mapping[str, Any]) -> None:
        super().__init__(below.content, defaults=below._defaults, read=below.read, path=below._path)
        self._values, self._below = values, below

    def __getitem__(self, key: str) -> Any:
        return self._values[key] if key in self._values else self._below[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values or key in self._below

    def __len__(self) -> int:
        return max(len(self._below), len(self._values))

    def defaulting(self, defaults: Mapping[str, Any]) -> Config:
        return _Replaced(self._below.defaulting(defaults), self._values)
