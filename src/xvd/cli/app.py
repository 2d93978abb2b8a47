# SPDX-License-Identifier: Apache-2.0
"""The program: the one place where an error becomes a line and an exit status.

Exit status: 0 success, 1 failure, 2 wrong usage; ``--run`` passes its command's status on. A verb
that a signal ends without being a daemon ends by that signal.
"""

import contextlib
import os
import sys

from xvd.cli import output, overview, signals
from xvd.cli.output import OutputLost
from xvd.errors import ConfigError, XvdError, describe


def _one_line(error: BaseException) -> str:
    return " ".join(describe(error).split())


def _complain(error: BaseException) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"xvd: {_one_line(error)}\n")


def run() -> int:
    """Run a verb and return its exit status; print what went wrong as one line on stderr."""
    try:
        signals.heed(signals.leave)
        return _ended()
    except ConfigError as error:
        _complain(error)
        return 2
    except OutputLost as error:
        output.drop()
        if not error.unread:
            _complain(error)
        return 1
    except (XvdError, OSError, MemoryError) as error:
        _complain(error)
        if not isinstance(error, XvdError):
            output.drop()  # it may be the output's own: a help text that found no room
        return 1
    except signals.Signalled as signalled:
        signals.die_by(signalled.number)


def _ended() -> int:
    """The status of a verb that has printed all it had to say."""
    known = overview.answer(sys.argv[1:])
    if known is not None and "_XVD_COMPLETE" not in os.environ:
        output.tell(known[0])
        return known[1]
    from xvd.cli.commands import app

    try:
        app(prog_name="xvd")
    except SystemExit as ended:
        status = ended.code
    else:
        status = 0
    output.tell("")
    return status if isinstance(status, int) else 0
