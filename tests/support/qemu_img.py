# SPDX-License-Identifier: Apache-2.0
"""qemu-img, which measures how fast it is for an encrypted image, and may fail to."""

import subprocess


def run_qemu_img(tool: str, *words: object) -> str:
    """Run it; what it says. It has to succeed."""
    command = [tool, *map(str, words)]
    while True:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        # It gives up where the clock of its CPU time went back.
        if "Unable to get accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
