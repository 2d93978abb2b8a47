# SPDX-License-Identifier: Apache-2.0
"""``xvd``: where the program begins.

Everything is imported after the first lines have run: Ctrl-C meanwhile ends the process by the
signal, as it does any program, and no traceback of an import is seen.
"""

import signal
import sys


def main() -> None:
    """Run what the arguments say; the process ends here."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from xvd.cli import output

    output.claim_descriptors()
    from xvd.cli import app

    sys.exit(app.run())


if __name__ == "__main__":
    main()
