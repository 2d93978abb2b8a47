# SPDX-License-Identifier: Apache-2.0
"""Print the man pages, from what ``--help`` and the pages' tables are made of.

Usage: ``print_man.py DIRECTORY`` writes xvd(1), a page for each verb, xvd.toml(5) and
xvd-storage(7) into a directory, which is made if need be.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import xvd  # before print_tables, which would have it from this tree
from print_tables import EXAMPLES, OF_THE_MACHINE, toml, usual
from roff import Page, bold, italic
from xvd.backend.settings import Settings
from xvd.cli import common
from xvd.cli.commands import imported
from xvd.cli.control import FIGURES
from xvd.cli.overview import HELP_OPTIONS, OPTIONS
from xvd.cli.verbs import ABOUT, VERBS
from xvd.engines.uri import LAYERS, SCHEMES
from xvd.machine.xen.here import XEN_DIRECTORY
from xvd.service.configuration import DEFAULT_PATH, TABLES, meaning, takes

GROUPS: Final = {
    "snapshot": "keep states of a disk in its storage, and go back to them",
    "disk": "show what a disk's storage is",
    "config": "check and show the file of a backend's settings",
}
"""What the verbs behind a verb are for, in a line: in the list of verbs stand their names."""

STATUSES: Final = {
    "0": "Success.",
    "1": "Failure; a line on standard error says what failed.",
    "2": "Wrong usage or wrong settings; a line on standard error says what is right.",
}
OF_A_COMMAND: Final = "With --run, the status of the command."
BY_SIGNAL: Final = "A verb that is no daemon and is ended by a signal ends by that signal."

ENVIRONMENT: Final = {
    "XVD_HOST": "The directory of the host, where --host is not given.",
    "XVD_CONFIG": "The file of settings, where --config is not given.",
    "NO_COLOR": "If it is set, nothing is coloured.",
}

FILES: Final = {
    str(DEFAULT_PATH): ("Settings of the backend; see xvd.toml(5).", "--config", "check"),
    f"{XEN_DIRECTORY}": ("What the daemons of a Xen domain keep.", "--host"),
    f"{XEN_DIRECTORY}/control": ("Sockets by which disks are shown and changed.", "--host"),
    f"{XEN_DIRECTORY}/{FIGURES}": ("Sockets that tell figures, and change nothing: the group xvd "
                                   "may use them.", "--listen"),
    f"{XEN_DIRECTORY}/state": ("Journals of rings, for the next backend.", "--kind"),
}  # fmt: skip
"""Each file: what it is, and the option or the verb whose page names it."""

RELATED: Final = (
    ("host", "backend", "attach", "detach", "list", "resize"),
    ("serve", "nbd", "load"),
    ("pause", "resume", "swap", "resize"),
    ("swap", "mirror", "backup", "snapshot", "disk"),
    ("backend", "set", "group", "config"),
    ("backend", "datapath"),
    ("list", "stats", "top", "exporter"),
    ("load", "bench", "sim", "doctor"),
)
"""Verbs that name each other at the end of their pages."""

STORAGE: Final = frozenset({"serve", "backend", "attach", "swap", "mirror", "backup", "load"})
"""Verbs that are told what storage to use."""

SETTINGS: Final = frozenset({"serve", "backend", "set", "group", "config", "nbd"})
"""Verbs that are told settings."""


def sentence(text: str) -> str:
    """Return a text as a sentence of its own."""
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def verbs_of(name: str) -> dict[str, Any]:
    """Return the commands of a verb by what is written for them: itself, or those behind it."""
    command = imported(name)
    behind: dict[str, Any] = getattr(command, "commands", {})
    if not behind:
        return {f"xvd {name}": command}
    return {f"xvd {name} {each}": one for each, one in behind.items()}


def arguments(command: Any) -> list[Any]:
    """Return a command's arguments, in their order."""
    return [it for it in command.params if it.param_type_name == "argument"]


def options(command: Any) -> list[Any]:
    """Return a command's options."""
    return [it for it in command.params if it.param_type_name == "option"]


def argument_name(argument: Any) -> str:
    """Return an argument as a synopsis has it."""
    name: str = argument.metavar or argument.name.upper()
    if argument.nargs == -1 and not name.endswith("..."):
        name += "..."
    return name if argument.required or name.startswith("[") else f"[{name}]"


def synopsis(words: str, command: Any) -> str:
    """Return how a command is called, in roff."""
    after = "".join(f" {italic(argument_name(it))}" for it in arguments(command))
    return f"{bold(words)} [{italic('OPTION')}...]{after}"


def value_name(option: Any) -> str:
    """Return what stands behind an option; nothing for a switch."""
    if option.is_flag or option.count:
        return ""
    choices = getattr(option.type, "choices", None)
    if choices:
        return "|".join(str(getattr(it, "value", it)) for it in choices)
    kinds = {"integer": "N", "float": "N", "path": "PATH"}
    kind = option.type.name.partition(" ")[0]
    return option.metavar or kinds.get(kind, "TEXT")


def option_head(option: Any) -> str:
    """Return an option with its other names and its value, in roff."""
    value = value_name(option)
    behind = f" {italic(value)}" if value else ""
    return ", ".join(f"{bold(name)}{behind}" for name in option.opts)


def parameter_text(parameter: Any) -> str:
    """Return what a parameter is, with its range, its default, and its variable."""
    words = [parameter.help.rstrip(".") + "."] if parameter.help else []
    low, high = (getattr(parameter.type, end, None) for end in ("min", "max"))
    if not getattr(parameter, "count", False):
        if low and high:
            words.append(f"From {low:g} to {high:g}.")
        elif low and low > 0:
            words.append(f"At least {low:g}.")
    default = default_text(parameter)
    if default and "default" not in (parameter.help or "").lower():
        words.append(f"Default: {default}.")
    if parameter.envvar:
        words.append(f"Or the variable {parameter.envvar}.")
    return " ".join(words)


def default_text(parameter: Any) -> str:
    """Return a default in words; nothing for one that goes without saying."""
    default = parameter.default
    if default == common.DEFAULT_HOST:  # the machine's, and not the one that prints this
        return (
            f"{XEN_DIRECTORY} where Xen is or XDG_RUNTIME_DIR is unset, else $XDG_RUNTIME_DIR/xvd"
        )
    if default is None or default is False or default in ("", [], 0):
        return ""
    if isinstance(default, list):
        return " ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(getattr(default, "value", default))


def describe(page: Page, command: Any) -> None:
    """Say what a command does, in the paragraphs of its help."""
    for paragraph in (command.help or "").split("\n\n"):
        page.paragraph(paragraph)


def list_parameters(page: Page, command: Any) -> None:
    """List arguments and options."""
    for argument in arguments(command):
        name = argument_name(argument).strip("[]")
        page.item(italic(name), parameter_text(argument))
    for option in options(command):
        page.item(option_head(option), parameter_text(option))
    helping = ", ".join(bold(name) for name in HELP_OPTIONS)
    page.item(helping, OPTIONS[", ".join(HELP_OPTIONS)])


def names_of(commands: Iterable[Any]) -> set[str]:
    """Return the names of all options of some commands, and their own."""
    every = list(commands)
    names = {name for command in every for option in options(command) for name in option.opts}
    return names | {command.name for command in every}


def variables_of(commands: Iterable[Any]) -> list[str]:
    """Return the environment's variables that some commands read."""
    found = {it.envvar for command in commands for it in command.params if it.envvar}
    return [name for name in ENVIRONMENT if name in found]


def references(name: str) -> list[str]:
    """Return the other pages that a verb's page names."""
    related = dict.fromkeys(it for group in RELATED if name in group for it in group)
    found = ["xvd(1)", *(f"xvd-{it}(1)" for it in related if it != name)]
    found += ["xvd.toml(5)"] if name in SETTINGS else []
    return found + (["xvd-storage(7)"] if name in STORAGE else [])


def see_also(page: Page, pages: Sequence[str]) -> None:
    """Name other pages."""
    page.section("SEE ALSO")
    page.raw(",\n".join(f"{bold(it[:-3])}{it[-3:]}" for it in pages))


def statuses(page: Page, *others: str) -> None:
    """Say what the exit status means."""
    page.section("EXIT STATUS")
    for status, text in STATUSES.items():
        page.item(bold(status), text)
    for text in others:
        page.paragraph(text)


def verb_page(name: str) -> Page:
    """Return a verb's page."""
    commands = verbs_of(name)
    line = GROUPS.get(name) or VERBS[name][1]
    page = Page(f"xvd-{name}", 1, line[0].lower() + line[1:].rstrip("."))
    page.section("SYNOPSIS")
    for number, (words, command) in enumerate(commands.items()):
        page.raw(".br" if number else "", synopsis(words, command))
    if len(commands) == 1 and name not in GROUPS:
        page.section("DESCRIPTION")
        describe(page, imported(name))
        page.section("OPTIONS")
        list_parameters(page, imported(name))
    else:
        page.section("COMMANDS")
        for words, command in commands.items():
            page.subsection(words)
            describe(page, command)
            list_parameters(page, command)
    names = names_of(commands.values())
    statuses(page, *([OF_A_COMMAND] if "--run" in names else []), BY_SIGNAL)
    if variables := variables_of(commands.values()):
        page.section("ENVIRONMENT")
        for variable in variables:
            page.item(bold(variable), ENVIRONMENT[variable])
    if files := [path for path, (_, *marks) in FILES.items() if names & set(marks)]:
        page.section("FILES")
        for path in files:
            page.item(italic(path), FILES[path][0])
    see_also(page, references(name))
    return page


def main_page() -> Page:
    """Return the page of the program itself."""
    page = Page("xvd", 1, "disks for Xen guests, from user space")
    page.section("SYNOPSIS")
    page.raw(f"{bold('xvd')} [{italic('OPTION')}] {italic('COMMAND')} [{italic('ARGUMENT')}...]")
    page.section("DESCRIPTION")
    page.paragraph(ABOUT)
    page.paragraph(
        "The backend serves disks to guests, as Linux's xen-blkback does; the frontend uses one, "
        "as xen-blkfront does. With Xen they run in dom0, in driver domains and in guests. On any "
        "other Linux host an emulated machine lets both run: see xvd-serve(1) for a disk in one "
        "call, and xvd-host(1) for daemons of their own."
    )
    page.section("COMMANDS")
    page.paragraph("Each has a page of its own, and xvd COMMAND --help prints the same in short.")
    for name, (_, line) in VERBS.items():
        page.item(f"{bold(f'xvd-{name}')}(1)", sentence(GROUPS.get(name, line)))
    page.section("OPTIONS")
    for names, text in OPTIONS.items():
        page.item(", ".join(bold(name) for name in names.split(", ")), text)
    statuses(page, BY_SIGNAL)
    page.section("ENVIRONMENT")
    for variable, text in ENVIRONMENT.items():
        page.item(bold(variable), text)
    page.section("FILES")
    for path, (text, *_) in FILES.items():
        page.item(italic(path), text)
    page.section("EXAMPLES")
    page.paragraph("An image through a Xen ring, as an NBD export, for as long as a command runs:")
    page.code("xvd serve disk.img --run 'qemu-img info $uri'")
    page.paragraph("The same disk in daemons of their own, on an emulated host:")
    page.code("xvd host machine &\nexport XVD_HOST=machine\nxvd backend &\n"
              "xvd attach 1 vdev=xvda,target=disk.img\nxvd nbd 1 xvda")  # fmt: skip
    see_also(page, [*(f"xvd-{name}(1)" for name in VERBS), "xvd.toml(5)", "xvd-storage(7)",
                    "xl-disk-configuration(5)"])  # fmt: skip
    return page


def settings_page() -> Page:
    """Return the page of the file of settings."""
    page = Page("xvd.toml", 5, "settings of xvd backend")
    page.section("DESCRIPTION")
    page.paragraph(
        f"`xvd backend` reads {DEFAULT_PATH} if it is there, or the file that --config or "
        "XVD_CONFIG names. It is TOML: tables of names and values. A name that there is not, and a "
        "value out of range, are errors, and the daemon does not start with them. The command line "
        "stands before the file."
    )
    page.paragraph(
        "`xvd config check` says whether the file is in order, and `xvd config show` what holds "
        "and from which line. After a change, `systemctl reload xvd-backend` lets it hold: at once "
        "what is marked live, the rest from a guest's next connection on."
    )
    for table, (head, body) in EXAMPLES.items():
        written = {"groups": "[groups.NAME]", "disks": '[disks."GUEST/VDEV"]'}.get(
            table, f"[{table}]"
        )
        page.section(written)
        page.paragraph(head)
        if body:
            names = "every limit" if table == "groups" else "every setting"
            page.paragraph(f"It takes {names} of [settings].")
        else:
            list_settings(page, table)
    page.section("EXAMPLES")
    page.code("".join(body for _, body in EXAMPLES.values()).rstrip())
    page.section("FILES")
    page.item(italic(str(DEFAULT_PATH)), FILES[str(DEFAULT_PATH)][0].partition(";")[0] + ".")
    see_also(page, ["xvd-backend(1)", "xvd-config(1)", "xvd-set(1)", "xvd-group(1)",
                    "xvd-storage(7)"])  # fmt: skip
    return page


def list_settings(page: Page, table: str) -> None:
    """List the names of a table of the file."""
    of = TABLES[table][0]
    rows = Settings.table() if table == "settings" else {}
    for name in of.__struct_fields__:
        words = [sentence(meaning(of, name)), f"It takes {takes(of, name)}."]
        if name not in OF_THE_MACHINE:
            words.append(f"Default: {toml(usual(table, name))}.")
        if name in rows and rows[name].live:
            words.append("Live.")
        page.item(bold(name), " ".join(words))


def storage_page() -> Page:
    """Return the page of how storage and layers are written."""
    page = Page("xvd-storage", 7, "how xvd is told what storage a disk has")
    page.section("DESCRIPTION")
    page.paragraph(
        "Storage is an image file, a block device, or a URI. A path alone is a raw image or a "
        "block device. One whose bytes look like another format is refused, as its guest would "
        "destroy what is in it: then the format has to be said. Sizes are bytes, or numbers with "
        "K, M, G or T; with s they are sectors of 512 bytes."
    )
    page.section("STORAGE")
    forms: dict[str, list[str]] = {}
    for scheme in SCHEMES.values():
        forms.setdefault(scheme.help, []).append(bold(scheme.form))
    for what, heads in forms.items():
        page.item(", ".join(heads), sentence(what))
    page.section("LAYERS")
    page.paragraph(
        "A layer stands in front of the storage. It is written behind --layer, as `NAME` or "
        "`NAME:OPTION=VALUE,OPTION=VALUE`, or before the storage: `LAYER|STORAGE`. There may be "
        "several; the first is nearest to the guest."
    )
    for layer in LAYERS.values():
        known = ", ".join(
            f"{name}={value}" if value else name for name, value in layer.options.items()
        )
        options = f" Options, with their defaults: {known}." if known else ""
        page.item(
            bold(layer.name),
            f"{sentence(layer.help)} Example: `{layer.example}`.{options}",
        )
    page.section("EXAMPLES")
    page.code("xvd serve 'cow:file=/var/tmp/changes|golden.img'\n"
              "xvd serve qcow2:disk.qcow2 --layer rate:iops=500\n"
              "xvd attach 1 vdev=xvda,target=rbd:pool/image")  # fmt: skip
    see_also(page, [*(f"xvd-{name}(1)" for name in VERBS if name in STORAGE), "qemu-img(1)"])
    return page


def pages() -> Iterator[Page]:
    """Make every page."""
    yield main_page()
    yield from map(verb_page, VERBS)
    yield settings_page()
    yield storage_page()


def main(words: list[str]) -> int:
    if len(words) != 1 or words[0].startswith("-"):
        print("usage: print_man.py DIRECTORY", file=sys.stderr)
        return 2
    directory = Path(words[0])
    directory.mkdir(parents=True, exist_ok=True)
    for page in pages():
        (directory / page.file).write_text(page.text(f"xvd {xvd.__version__}"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
