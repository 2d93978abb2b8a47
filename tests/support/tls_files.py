# SPDX-License-Identifier: Apache-2.0
"""Certificates as people make them, by openssl, under the names that nbdkit and QEMU look for."""

import subprocess
from pathlib import Path


def make_credentials(openssl: str, directory: Path) -> Path:
    """An authority's, a server's (for this host) and a client's, with their keys."""
    directory.mkdir(exist_ok=True)
    for name in ("ca", "server", "client"):
        command = [openssl, "req", "-x509", "-subj", f"/CN={name}", "-days", "30", "-noenc"]
        command += ["-newkey", "rsa:2048", "-keyout", f"{name}-key.pem", "-out", f"{name}-cert.pem"]
        if name != "ca":
            command += ["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem"]
            command += ["-addext", "basicConstraints=critical,CA:FALSE"]
        if name == "server":
            command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
        subprocess.run(command, cwd=directory, check=True, capture_output=True)
    return directory
