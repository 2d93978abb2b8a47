# SPDX-License-Identifier: Apache-2.0
"""The options that say what storage a disk has; their help is made from the engines."""

from typing import Annotated

import typer

from xvd.cli import completion
from xvd.engines.uri import LAYERS, SCHEMES


def _storage() -> dict[str, list[str]]:
    """How storage is written, by what is then served."""
    found: dict[str, list[str]] = {}
    for scheme in SCHEMES.values():
        found.setdefault(scheme.help, []).append(scheme.form)
    return found


Layers = Annotated[
    list[str],
    typer.Option(
        "--layer",
        autocompletion=completion.layers,
        help="A layer in front of the storage: "
        + "; ".join(f"{layer.example} ({layer.help})" for layer in LAYERS.values())
        + ". May be given several times; the first is nearest to the guest.",
    ),
]
Images = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE...",
        help="Image file, block device, or engine URI: "
        + "; ".join(f"{', '.join(forms)} ({what})" for what, forms in _storage().items())
        + ".",
    ),
]
