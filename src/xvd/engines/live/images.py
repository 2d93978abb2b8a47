# SPDX-License-Identifier: Apache-2.0
"""Images that are made where somebody names one that is not there yet."""

import os
from typing import Final

from xvd.engines.formats import FORMATS
from xvd.engines.qemu.images import run_qemu_img
from xvd.engines.text import split_scheme
from xvd.errors import ConfigError

_RAW: Final = ("", "file", "raw")
_CAN_HAVE_BACKING: Final = ("qcow2", "qed")


def _format_of(image: str) -> tuple[str, str]:
    """QEMU's name of the format, and the path; no name for what is no image file."""
    scheme, path = split_scheme(image)
    if scheme in _RAW:
        return "raw", path
    row = FORMATS.get(scheme)
    driver = row.driver if row else scheme
    known = driver in {row.driver for row in FORMATS.values()} - {"luks"}
    return (driver if known else ""), path


def _is_there(path: str) -> bool:
    """Whether there is something of this name, by opening it, and not to use it: a confined process
    may not be able to look at the directory."""
    try:
        os.close(os.open(path, os.O_PATH | os.O_CLOEXEC))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def create_image(image: str, size: int, backing: str = "") -> str:
    """Make the image file that a URI names, of `size` bytes, if there is none; sparse, and for this
    user alone: it is about to have what a guest has. Its path, if it was made.

    backing: the URI of an image that it is to be an overlay of. Then one that is there already has
    to be that image itself, which is written over. Raises `ConfigError`, with what qemu-img says.
    """
    driver, path = _format_of(image)
    if not driver or _is_there(path):
        if backing and image != backing:
            raise ConfigError(
                f"what has changed since {backing} goes into a new image (qcow2:PATH), or over "
                f"{backing}; {image} is neither"
            )
        return ""
    if backing and driver not in _CAN_HAVE_BACKING:
        raise ConfigError(f"{image} cannot have {backing} behind it: write qcow2:PATH")
    if driver == "raw":
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)
        return path
    words = ["create", "-q", "-f", driver, *_words_of_backing(backing), path, str(size)]
    run_qemu_img(words, f"{path} cannot be made")
    return path


def _words_of_backing(backing: str) -> list[str]:
    if not backing:
        return []
    driver, path = _format_of(backing)
    if not driver:
        raise ConfigError(f"no image can have {backing} behind it: it is no file")
    return ["-b", os.path.abspath(path), "-F", driver]
