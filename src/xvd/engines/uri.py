# SPDX-License-Identifier: Apache-2.0
"""From what the user or the toolstack writes to an open engine: a URI, and layers in front of it.

A module listed here brings its own schemes, openers and help, or its own layer with its options.
Nothing else has to know of it. A bare path is a file. Layers are written ``NAME`` or
``NAME:key=value,key=value``; the first one is nearest to the guest. They may stand in front of a
URI, too: ``LAYER|LAYER|URI``.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from xvd.blkif.assignment import BackendAssignment
from xvd.engines import image, memory, null
from xvd.engines.checked import Checked
from xvd.engines.interface import Engine, Opening, Scheme
from xvd.engines.layers import cow, delay, error, log, rate, readonly, stats, zeroes
from xvd.engines.layers.base import LayerKind
from xvd.engines.qemu import schemes as qemu
from xvd.engines.rbd import schemes as rbd
from xvd.engines.text import in_format, parse_options, split_scheme
from xvd.errors import ConfigError

SCHEMES: Final[dict[str, Scheme]] = {
    scheme.name: scheme for module in (image, memory, null, qemu, rbd) for scheme in module.SCHEMES
}
PATH_SCHEMES: Final = frozenset(
    name for name, scheme in SCHEMES.items() if scheme.form == f"{name}:PATH"
)
"""The schemes behind which a path stands, which may be a relative one."""

_RAW: Final = ("file", "raw")

LAYERS: Final[dict[str, LayerKind]] = {
    module.LAYER.name: module.LAYER
    for module in (cow, zeroes, delay, rate, error, readonly, stats, log)
}

LOCK_PATIENCE_S: Final = 5.0
"""How long a backend waits for the lock of a predecessor that was killed with I/O in flight."""


def split_layers(uri: str) -> tuple[list[str], str]:
    """Split ``LAYER|LAYER|URI``; a path may have such a line in its name as well."""
    *words, last = uri.split("|")
    layers: list[str] = []
    while words and words[0].partition(":")[0] in LAYERS:
        layers.append(words.pop(0))
    return layers, "|".join([*words, last])


def _kind(text: str) -> LayerKind:
    name = text.partition(":")[0]
    if name not in LAYERS:
        raise ConfigError(f"there is no layer {name!r}; there are {', '.join(sorted(LAYERS))}")
    return LAYERS[name]


def parse_layer(text: str) -> tuple[LayerKind, dict[str, str]]:
    """(the layer that `text` describes, its options); `ConfigError` if there is no such one."""
    name, _, rest = text.partition(":")
    layer, options = _kind(text), parse_options(rest)
    if wrong := sorted(options.keys() - layer.options.keys()):
        known = ", ".join(layer.options)
        has = f"its options are {known}" if known else "it has none"
        raise ConfigError(f"layer {name} has no option {', '.join(wrong)}; {has}")
    return layer, {**layer.options, **options}


def add_layer(lower: Engine, text: str) -> Engine:
    """Put the layer that `text` describes in front; raises `ConfigError`."""
    layer, options = parse_layer(text)
    return layer.make(lower, options)


def scheme_of(uri: str) -> tuple[Scheme, str]:
    """Return the scheme of a URI without layers, and what stands behind it; a bare path is a file.

    Raises `ConfigError` for a URI that is no storage.
    """
    name, rest = split_scheme(uri)
    name = name or "file"
    if name not in SCHEMES:
        known = ", ".join(f"{known}:" for known in sorted(SCHEMES))
        raise ConfigError(f"unknown storage {uri!r}; there are {known} and a bare path is a file")
    if not rest:
        raise ConfigError(f"{uri!r} names no storage; write a path or a size after {name}:")
    return SCHEMES[name], rest


def open_engine(
    uri: str,
    *,
    read_only: bool = False,
    layers: Sequence[str] = (),
    patience_s: float = 0.0,
    user: str = "",
    device_model: bool = False,
) -> Engine:
    """Open what `uri` names, with `layers` in front and checked; the rest is as in `Opening`.

    Raises `ConfigError` for what cannot be understood, `EngineError` for what cannot be opened.
    """
    own, uri = split_layers(uri)
    layers = (*layers, *own)
    scheme, rest = scheme_of(uri)
    only_reads = read_only or any(_kind(text).only_reads for text in layers)
    engine = scheme.open(rest, Opening(only_reads, patience_s, user, device_model))
    return with_layers(engine, layers, read_only=read_only)


def with_layers(engine: Engine, layers: Sequence[str], *, read_only: bool = False) -> Engine:
    """Put `layers`, the first nearest to the guest, and the checks in front of an open engine.

    It is closed where that fails, by a `ConfigError` for a layer.
    """
    try:
        only_reads = read_only or any(_kind(text).only_reads for text in layers)
        if only_reads and not engine.info.read_only:
            engine = readonly.ReadOnly(engine)
        for text in reversed(layers):
            engine = add_layer(engine, text)
        if read_only and not engine.info.read_only:
            engine = readonly.ReadOnly(engine)
        return Checked(engine)
    except BaseException:
        engine.close()
        raise


def named_files(uri: str, layers: Sequence[str] = ()) -> dict[str, bool] | None:
    """Return every file that storage is opened by, and whether it is made where it is not there.

    None for storage that takes programs, or a network. Raises `ConfigError` as `open_engine`.
    """
    own, uri = split_layers(uri)
    kind, rest = scheme_of(uri)
    if kind.files is None:
        return None
    files = dict.fromkeys(kind.files(rest), False)
    for text in (*layers, *own):
        layer, options = parse_layer(text)
        files |= dict.fromkeys(layer.files(options), True)
    return files


class Look(NamedTuple):
    """What was seen of storage: the path at which the disk lies as its guest sees it, if there is
    one, and whether that is a block device."""

    path: str
    is_device: bool


def examine(uri: str, *, read_only: bool = False) -> Look:
    """Look at the storage that `uri` names without opening it for good: no lock is taken.

    read_only: it need not be writable. Raises `ConfigError` for a URI that is no storage and for a
    relative path, and `EngineError` for a file that is not there or may not be opened so. Of
    storage behind a program or a network only the URI is looked at.
    """
    layers, uri = split_layers(uri)
    kinds = [parse_layer(text)[0] for text in layers]
    read_only = read_only or any(kind.only_reads for kind in kinds)
    scheme, rest = scheme_of(uri)
    if scheme.name not in PATH_SCHEMES:
        return Look("", False)
    is_raw = scheme.name in _RAW
    path = image.path_of(rest) if is_raw else rest
    if not path.startswith("/"):
        raise ConfigError(f"{uri!r} is a relative path; write it from the root")
    is_device = image.examine(path, read_only=read_only, raw=scheme.name != "file")
    return Look(path if is_raw and not layers else "", is_device)


def storage_uri(assignment: BackendAssignment) -> str:
    """The engine URI of a disk that the toolstack assigned.

    In the tap slot libxl puts ``aio:`` before the target, whatever it is; a path is one of a file.
    """
    if assignment.image_format != "raw":
        return f"{assignment.image_format}:{assignment.image}"
    if assignment.format_said:
        layers, image = split_layers(assignment.image)
        return "|".join([*layers, in_format(image, "raw")])
    return assignment.image


def open_assigned(
    assignment: BackendAssignment, *, layers: Sequence[str] = (), device_model: bool = False
) -> Engine:
    """Open an assigned disk's storage; it may take as long as the storage does, and the lock.

    layers, device_model: as in `open_engine`.
    """
    name = assignment.name or assignment.frontend.rpartition("/")[2]
    return open_engine(
        storage_uri(assignment),
        read_only=not assignment.writable,
        layers=layers,
        patience_s=LOCK_PATIENCE_S,
        user=f"{assignment.frontend_domid}/{name}",
        device_model=device_model,
    )
