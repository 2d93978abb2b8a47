# SPDX-License-Identifier: Apache-2.0
"""Certificates as people make them, by openssl, under the names that nbdkit and QEMU look for."""

import subprocess
from pathlib import Path

AUTHORITY = """
[ca]
default_ca = own
[own]
database = index.txt
new_certs_dir = .
rand_serial = yes
default_md = sha256
policy = named
x509_extensions = any
[named]
commonName = supplied
[any]
basicConstraints = CA:{authority}
"""


def make_dated(openssl: str, directory: Path, name: str, begins: int, ends: int) -> None:
    """Put a certificate in the place of one: the same key, valid from a year to a year."""
    (directory / "index.txt").touch()
    (directory / "dates.cnf").write_text(AUTHORITY.format(authority=str(name == "ca").upper()))
    key, request = f"{name}-key.pem", f"{name}.csr"
    commands = (
        ("req", "-new", "-subj", f"/CN={name}", "-key", key, "-out", request),
        ("ca", "-batch", "-config", "dates.cnf", "-selfsign", "-keyfile", key, "-in", request,
         "-out", f"{name}-cert.pem", "-notext", "-startdate", f"{begins}0101000000Z",
         "-enddate", f"{ends}0101000000Z"),
    )  # fmt: skip
    for command in commands:
        subprocess.run([openssl, *command], cwd=directory, check=True, capture_output=True)


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
