"""A config.json that checks what it is asked for, and remembers which of its keys were read.

A value of another type or out of range (`config_keys`) is an error where its key is read, before anything is done with
it.

A key that nobody reads may still change the logits. A family's `variant` and `geometry` get this mapping instead of the
plain one, so that afterwards every key is known to be read or unread (`recipes.trust.keys`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from smoothquant.config_keys import KEYS
from smoothquant.errors import CheckpointError


class Config(Mapping[str, Any]):
    """The keys and values of a config.json. An object within it comes back as a Config too.

    content: the content of the file. read: the paths of the keys that were read, such as ("hidden_size",) and
    ("rope_scaling", "factor"). A config shares it with all configs that are made from it. where: names the file in
    errors.

    Iterating over all keys, as `{**config}` does, would count them all as read, so it raises CheckpointError. Use
    `defaulting` and `replacing` instead.
    """

    def __init__(
        self,
        content: Mapping[str, Any],
        *,
        values: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        read: set[tuple[str, ...]] | None = None,
        path: tuple[str, ...] = (),
        where: str = "config.json",
    ) -> None:
        self.content, self._path, self._where = content, path, where
        self._values, self._defaults = values or {}, defaults or {}  # they go before and after the file's values
        self.read: set[tuple[str, ...]] = set() if read is None else read

    def __getitem__(self, key: str) -> Any:
        if key in self._values:
            return self._values[key]
        self.read.add((*self._path, key))
        if key not in self.content:
            return self._defaults[key]
        value = self.content[key]
        if key in KEYS:
            KEYS[key].check(value, f"{self._where}: {'.'.join((*self._path, key))}")
        if isinstance(value, Mapping):
            return Config(value, read=self.read, path=(*self._path, key), where=self._where)
        return value

    def __contains__(self, key: object) -> bool:
        if key in self._values:
            return True
        self.read.add((*self._path, str(key)))
        return key in self.content or key in self._defaults

    def __len__(self) -> int:
        return len(self._values.keys() | self.content.keys() | self._defaults.keys())

    def __iter__(self) -> Iterator[str]:
        raise CheckpointError(
            "a family's geometry reads all keys of config.json at once",
            expected="config.get(KEY), config[KEY] or KEY in config, so that the keys that nobody reads are known",
            do="write config.defaulting({...}) for {**defaults, **config}, config.replacing({...}) for {**config, ...}",
        )

    def defaulting(self, defaults: Mapping[str, Any]) -> Config:
        """A config with values for keys that are absent from this one."""
        return self._with(self._values, {**self._defaults, **defaults})

    def replacing(self, values: Mapping[str, Any]) -> Config:
        """A config with other values for some keys. The file's values for these keys stay unread."""
        return self._with({**self._values, **values}, self._defaults)

    def _with(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Config:
        return Config(
            self.content, values=values, defaults=defaults, read=self.read, path=self._path, where=self._where
        )
