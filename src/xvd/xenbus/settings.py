# SPDX-License-Identifier: Apache-2.0
"""Settings of an end: a dataclass whose fields are its table, and ``NAME=VALUE`` read by it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Final, Self, TypeVar

from xvd.errors import ConfigError

T = TypeVar("T")
Value = int | str
_ROW: Final = "setting"
_WORDS: Final = {"y": 1, "n": 0, "yes": 1, "no": 0, "on": 1, "off": 0}


@dataclass(frozen=True, slots=True)
class Setting:
    """What is known of one setting besides its name, type and default, which are the field's.

    low, high: the smallest and the largest value; 0 and 1 are a switch's. meaning: in a line, with
    the unit. whose: the driver that has a parameter of this name, ``xvd`` where none has. live: it
    holds at once, and not only from the next connection on. choices: the only values, where not all
    between are. usual: the default in words, where it is the machine's affair. words: the values of
    one that is no number. pattern: what one that is a free word has to match.
    """

    low: int
    high: int
    meaning: str
    whose: str
    live: bool = False
    choices: tuple[int, ...] = ()
    usual: str = ""
    words: tuple[str, ...] = ()
    pattern: str = ""

    @property
    def is_text(self) -> bool:
        """Whether it is no number."""
        return bool(self.words or self.pattern)

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off."""
        return (self.low, self.high) == (0, 1) and not self.is_text

    @property
    def takes(self) -> str:
        """Which values there are, in words."""
        if self.pattern:
            return "64 letters, digits, dots, - and _ at most"
        if self.words:
            return " or ".join(self.words)
        if self.choices:
            *others, last = map(str, self.choices)
            return f"{', '.join(others)} or {last}"
        return f"a whole number from {self.low} to {self.high}"


def setting(
    default: T, low: int, high: int, meaning: str, *, whose: str = "xvd", live: bool = False,
    choices: tuple[int, ...] = (), usual: str = "",
) -> T:  # fmt: skip
    """Make a dataclass field that can be set by name; see `Setting`."""
    row = Setting(low, high, meaning, whose, live, choices, usual)
    return field(default=default, metadata={_ROW: row})


def word_setting(*words: str, meaning: str, live: bool = False) -> str:
    """Make a dataclass field that is one of some words, the first if it is not set."""
    row = Setting(0, 0, meaning, "xvd", live, words=words)
    return field(default=words[0], metadata={_ROW: row})


def name_setting(meaning: str, *, whose: str = "xvd", live: bool = False) -> str:
    """Make a dataclass field that is somebody's name, or empty if it is not set."""
    row = Setting(0, 0, meaning, whose, live, pattern=r"[A-Za-z0-9_.-]{0,64}")
    return field(default="", metadata={_ROW: row})


@dataclass(frozen=True, slots=True)
class SettingsBase:
    """What the settings of both ends can do. None leaves a value to the machine.

    Raises `ConfigError` for what is out of range.
    """

    def __post_init__(self) -> None:
        for name, row in self.table().items():
            value = getattr(self, name)
            if value is None:
                continue
            if row.is_text:
                self._check_text(name, row, value)
                continue
            if not row.low <= value <= row.high:
                raise ConfigError(f"{name} is {value}; it goes from {row.low} to {row.high}")
            if row.choices and value not in row.choices:
                raise ConfigError(f"{name} is {value}; it may be {row.takes}")

    @staticmethod
    def _check_text(name: str, row: Setting, value: str) -> None:
        if row.words and value not in row.words:
            raise ConfigError(f"{name} is {value}; it may be {row.takes}")
        if row.pattern and not re.fullmatch(row.pattern, value):
            raise ConfigError(f"{name} is {value!r}; it may have {row.takes}")

    @classmethod
    @cache
    def table(cls) -> Mapping[str, Setting]:
        """Return what may be set by name: a class's own, and then what it inherits."""
        own_first = sorted(fields(cls), key=lambda one: one.name not in cls.__annotations__)
        return {one.name: one.metadata[_ROW] for one in own_first if _ROW in one.metadata}

    @classmethod
    def parse(cls, texts: Iterable[str]) -> dict[str, Value]:
        """Values by name from ``NAME=VALUE``; Y and N are a switch's. Raises `ConfigError`."""
        values: dict[str, Value] = {}
        for text in texts:
            name, equals, value = (part.strip() for part in text.partition("="))
            row = cls.table().get(name)
            if not equals or row is None:
                names = ", ".join(cls.table())
                raise ConfigError(f"{text!r} sets nothing; write NAME=VALUE with one of {names}")
            if row.is_text:
                values[name] = value
                continue
            number = _WORDS.get(value.lower()) if row.is_switch else None
            if number is None and not (value.isascii() and value.isdigit()):
                raise ConfigError(f"{text}: {name} takes {row.takes}")
            number = int(value) if number is None else number
            values[name] = bool(number) if row.is_switch and number in (0, 1) else number
        return values

    @classmethod
    def of(cls, texts: Iterable[str]) -> Self:
        """Return the defaults, changed by ``NAME=VALUE``. Raises `ConfigError`."""
        return cls().changed(cls.parse(texts))

    def changed(self, values: Mapping[str, Any]) -> Self:
        """Return these settings but for `values`, which `parse` read. Raises `ConfigError`."""
        return replace(self, **values)

    def values(self) -> dict[str, Value | None]:
        """Return each setting by name, switches as 0 and 1."""
        values = {name: getattr(self, name) for name in self.table()}
        return {n: int(value) if isinstance(value, bool) else value for n, value in values.items()}
