# SPDX-License-Identifier: Apache-2.0
"""What a backend goes by: the file of settings, and what the command line says instead."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from xvd.backend.budget import Amounts, Budget
from xvd.backend.groups import Groups
from xvd.backend.server import settings_apart
from xvd.backend.settings import Settings
from xvd.cli import common
from xvd.cli.succession import Succession
from xvd.errors import XvdError
from xvd.loglimit import fields
from xvd.service.configuration import DEFAULT_PATH, Ceiling, Configuration, read

logger = logging.getLogger(__name__)

_LEVELS: Final = {"warning": 0, "info": 1, "debug": 2}
"""Words of the file, and how often -v says the same."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a backend goes by, checked.

    isolation: a process for each guest. state_directory: empty for the usual one. settings: what
    `texts` set.
    """

    isolation: str
    copy: bool
    kinds: list[str]
    layers: list[str]
    state_directory: str
    budget: Ceiling
    texts: list[str]
    settings: Settings
    overrides: dict[str, list[str]]
    groups: dict[str, list[str]]
    verbose: int

    def lower(self, budget: Amounts) -> Budget:
        """Return what this host has for disks, or less where that is wanted."""
        most = self.budget.values()
        lower = {name: min(budget.of(name), int(of)) for name, of in most.items() if of is not None}
        return Budget(replace(budget, **lower))


_FROM_THE_NEXT_START: Final = (
    "isolation", "copy", "kinds", "layers", "state_directory", "budget",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What the command line says of all that a file may say too; it stands before the file.

    config: the file; None: the usual one, if it is there.
    """

    config: Path | None
    isolation: str
    kinds: Sequence[str]
    copy: bool
    settings: Sequence[str]
    groups: Sequence[str]
    layers: Sequence[str]
    verbose: int

    def wanted(self) -> Wanted:
        """Read the file, and put the command line before it. Raises `ConfigError`."""
        file = Configuration()
        if self.config is not None or DEFAULT_PATH.exists():
            file = read(self.config or DEFAULT_PATH)
        for_all, for_one = common.split_settings(self.settings)
        copying, texts = self.copy or file.daemon.copy, [*file.settings, *for_all]
        settings = Settings(copying=copying).changed(Settings.parse(texts))
        wanted = Wanted(
            self.isolation or file.daemon.isolation,
            copying,
            list(self.kinds or file.daemon.kinds),
            list(self.layers or file.daemon.layers),
            file.daemon.state_directory,
            file.budget,
            texts,
            settings,
            _joined(file.overrides, for_one),
            _joined(file.groups, common.split_groups(self.groups)),
            self.verbose or _LEVELS[file.daemon.log_level],
        )
        settings_apart(settings, {n: Settings.parse(t) for n, t in wanted.overrides.items()})
        Groups(wanted.groups)
        return wanted


def _joined(first: dict[str, list[str]], then: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return both texts of each name; what comes later stands before what is first."""
    return {name: [*first.get(name, ()), *then.get(name, ())] for name in {**first, **then}}


class Reloading:
    """Lets a running daemon go by its file again, and by its program, where another version of that
    is installed by now; what is not in order changes nothing.

    replace: lets what is wanted now hold, as far as that may change; it may raise `ConfigError`.
    """

    def __init__(
        self,
        line: CommandLine,
        began: Wanted,
        replace: Callable[[Wanted], Awaitable[None]],
        succession: Succession,
    ) -> None:
        self._line = line
        self._began = began
        self._replace = replace
        self._succession = succession

    async def __call__(self) -> None:
        """Read the file again, and let a change hold as `xvd set` does; or let a process of the
        other version go on by that file."""
        try:
            wanted = self._line.wanted()
            if self._succession.is_due:
                await self._succession.hand_over()
                return
            await self._replace(wanted)
        except XvdError as error:
            logger.error("all stays as it was: %s", error, extra=fields("", event="reload-failed"))
            return
        common.log_at(wanted.verbose)
        for name in _FROM_THE_NEXT_START:
            if getattr(wanted, name) != getattr(self._began, name):
                logger.warning("%s: another value holds from the next start on", name)
        logger.info("the settings were read again", extra=fields("", event="reloaded"))
