# SPDX-License-Identifier: Apache-2.0
"""Settings are read by the table of their end."""

from dataclasses import dataclass

import pytest

from xvd.errors import ConfigError
from xvd.xenbus.settings import SettingsBase, setting


@dataclass(frozen=True, slots=True)
class Kettle(SettingsBase):
    colour: str = "red"
    litres: int = setting(2, 1, 4, "how much it holds", choices=(1, 2, 4))
    whistles: bool = setting(True, 0, 1, "when it boils", live=True)
    minutes: int | None = setting(None, 0, 9, "until it boils", usual="the stove's affair")


def test_the_fields_are_the_table() -> None:
    table = Kettle.table()

    assert list(table) == ["litres", "whistles", "minutes"]
    assert [name for name, row in table.items() if row.is_switch] == ["whistles"]
    assert [name for name, row in table.items() if row.live] == ["whistles"]


@pytest.mark.parametrize(
    ("texts", "kettle"),
    [
        ([], Kettle()),
        ([" litres = 4 ", "minutes=0"], Kettle(litres=4, minutes=0)),
        (["litres=1", "litres=2"], Kettle(litres=2)),
        *[([f"whistles={word}"], Kettle(whistles=False)) for word in ("0", "n", "No", "off")],
        *[([f"whistles={word}"], Kettle(whistles=True)) for word in ("1", "Y", "yes", "ON")],
    ],
)
def test_a_setting_is_written_by_name(texts: list[str], kettle: Kettle) -> None:
    assert Kettle.of(texts) == kettle


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "colour=blue",
            "'colour=blue' sets nothing; write NAME=VALUE with one of litres, whistles",
        ),
        ("litres", "'litres' sets nothing"),
        ("litres=Y", "litres=Y: litres takes 1, 2 or 4"),
        ("litres=-1", "litres=-1: litres takes 1, 2 or 4"),
        ("litres=\u0661", "litres takes 1, 2 or 4"),
        ("litres=5", "litres is 5; it goes from 1 to 4"),
        ("litres=3", "litres is 3; it may be 1, 2 or 4"),
        ("whistles=2", "whistles is 2; it goes from 0 to 1"),
    ],
)
def test_what_cannot_be_set_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Kettle.of([text])


def test_the_range_holds_also_for_what_is_not_read() -> None:
    with pytest.raises(ConfigError, match="minutes is 10; it goes from 0 to 9"):
        Kettle(minutes=10)


def test_values_are_numbers_for_programs() -> None:
    values = Kettle(whistles=True).values()

    assert values == {"litres": 2, "whistles": 1, "minutes": None}
    assert type(values["whistles"]) is int
