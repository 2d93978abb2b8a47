# SPDX-License-Identifier: Apache-2.0
"""The file of settings: what may stand in it, and what is said of what may not."""

import re
from pathlib import Path

import pytest

from xvd.backend.iotune import IoTune
from xvd.backend.settings import Settings
from xvd.errors import ConfigError
from xvd.service.configuration import TABLES, Configuration, Daemon, meaning, parse, shown, takes

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "contrib" / "xvd.toml"
FILE = Path("/etc/xvd/xvd.toml")


def test_every_table_is_read() -> None:
    text = """
[daemon]
kinds = ["vbd3"]
layers = ["delay:read=1ms"]
log_level = "info"
[budget]
memory = 1_000_000
[settings]
max_queues = 4
feature_persistent = false
on_error = "hold"
[groups.gold]
total_iops_sec = 5000
[disks."1/xvda"]
group_name = "gold"
[disks."web/xvdb"]
max_queues = 1
"""
    found = parse(text, FILE)

    assert (found.daemon.kinds, found.daemon.log_level) == (["vbd3"], "info")
    assert found.budget.memory == 1_000_000
    assert found.settings == ["max_queues=4", "feature_persistent=0", "on_error=hold"]
    assert found.groups == {"gold": ["total_iops_sec=5000"]}
    assert found.overrides == {"1/51712": ["group_name=gold"], "web/51728": ["max_queues=1"]}


def test_an_empty_file_says_nothing() -> None:
    assert parse("# nothing\n", FILE) == Configuration(FILE)


MISTAKES = [
    ("x = 1", ":1: there is no table [x]; there are daemon, budget, settings, groups, disks"),
    ("[setting]", ":1: there is no table [setting]; did you mean settings?"),
    ("a == 2", ": line 1, column 4: this is no TOML: Invalid value"),
    ("settings = 3", ":1: settings is a table: write [settings]"),
    ("[groups]\ngold = 3", ":2: groups.gold is a table: write [groups.gold]"),
    ("[settings]\nmax_queue = 4",
     ":2: [settings]: there is no setting 'max_queue'; did you mean max_queues?"),
    ("[settings]\n\nmax_queues = '4'",
     ":3: [settings]: max_queues takes a whole number from 0 to 1024"),
    ("[settings]\nmax_queues = 4000",
     ":2: [settings]: max_queues is 4000; it goes from 0 to 1024"),
    ("settings.max_queues = 4000", ":1: [settings]: max_queues is 4000; it goes from 0 to 1024"),
    ("[settings]\nfeature_persistent = 1",
     ":2: [settings]: feature_persistent takes true or false"),
    ("[settings]\non_error = 'wait'",
     ":2: [settings]: on_error is wait; it may be report or hold"),
    ("[disks.'1/xvda']\nread_iops_sec = 5\nread_iops_sec_max = 3",
     ':3: [disks."1/xvda"]: read_iops_sec_max is 3; a burst is more than read_iops_sec, 5'),
    ("[disks.xvda]",
     ":1: 'xvda' names no disk; write DOMID/VDEV or NAME/VDEV, as 1/xvda"),
    ("[disks.'1/xvda']\n[disks.'1/51712']",
     ':2: [disks."1/51712"] is the same disk as another table\'s'),
    ("[groups.gold]\ntotal_iops_sec_max = 5",
     ":2: [groups.gold]: total_iops_sec_max is a burst of nothing; set total_iops_sec too"),
    ("[groups.'a b']",
     ":1: [groups.\"a b\"]: group_name is 'a b'; "
     "it may have 64 letters, digits, dots, - and _ at most"),
    ("[daemon]\nkinds = ['vbx']", ':2: [daemon]: kinds takes a list of "vbd" and "vbd3"'),
    ("[daemon]\nlayers = ['delay:x=2']",
     ":2: [daemon]: layers: layer delay has no option x; its options are read, write, flush, "
     "discard"),
    ("[daemon]\nstate_directory = 'x'",
     ":2: [daemon]: state_directory takes a path that begins with /"),
    ("[budget]\nmemory = 0", ":2: [budget]: memory is 0; it goes from 1 to 1000000000000000"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), MISTAKES, ids=lambda it: it.split("\n")[-1][:30])
def test_a_mistake_is_told_with_its_line_and_what_is_right(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{FILE}{said}')}$"):
        parse(text, FILE)


def test_a_group_takes_limits_only() -> None:
    with pytest.raises(ConfigError, match=r"no setting 'max_queues'; there are total_bytes_sec, "):
        parse("[groups.gold]\nmax_queues = 1", FILE)


def test_every_setting_may_stand_in_the_file() -> None:
    assert set(TABLES["settings"][0].__struct_fields__) == set(Settings.table())
    assert set(TABLES["groups"][0].__struct_fields__) == {*IoTune.table()} - {"group_name"}


@pytest.mark.parametrize("table", TABLES)
def test_every_name_of_the_file_says_what_it_means_and_takes(table: str) -> None:
    of = TABLES[table][0]

    assert [
        name for name in of.__struct_fields__ if not (meaning(of, name) and takes(of, name))
    ] == []


# ---- The example -------------------------------------------------------------------------------


def uncommented() -> str:
    """The example with everything in it set."""
    return re.sub(r"^#(?=[a-z_]+ = |\[)", "", EXAMPLE.read_text(), flags=re.MULTILINE)


def test_the_example_changes_nothing() -> None:
    found = parse(EXAMPLE.read_text(), FILE)

    assert (found.settings, found.groups, found.disks) == ([], {}, {})
    assert found.daemon == Daemon()


def test_everything_in_the_example_may_be_set() -> None:
    found = parse(uncommented(), FILE)

    settings = Settings.of(found.settings)
    assert settings == Settings(poll_us=50)  # the machine's affair, so it is an example
    assert found.groups.keys() == {"gold"}
    assert found.disks.keys() == {"web/xvda", "1/xvdb"}
    assert None not in found.budget.values().values()


def test_the_example_has_every_name() -> None:
    lines = parse(uncommented(), FILE).lines

    for table in ("daemon", "budget", "settings"):
        assert {name for name in TABLES[table][0].__struct_fields__ if (table, name) not in lines} \
            == set()  # fmt: skip


def test_the_pages_file_is_in_order() -> None:
    page = (ROOT / "docs" / "running.md").read_text()
    [text] = re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)

    assert parse(text, FILE).overrides.keys() == {"web/51712", "1/51728"}


# ---- What is shown -----------------------------------------------------------------------------


def test_each_value_is_shown_with_where_it_is_from() -> None:
    text = "[settings]\nmax_queues = 4\n[disks.'1/xvda']\non_error = 'hold'\n"

    rows = {(row.table, row.name): row for row in shown(parse(text, FILE))}

    assert (rows["settings", "max_queues"].value, rows["settings", "max_queues"].origin) == (
        4, f"{FILE}:2",
    )  # fmt: skip
    assert rows["settings", "on_error"].origin == "default"
    assert rows['disks."1/xvda"', "on_error"].origin == f"{FILE}:4"
    assert rows["daemon", "log_level"].value == "warning"
