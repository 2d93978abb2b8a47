# SPDX-License-Identifier: Apache-2.0
"""``rbd:``, taken apart. Whoever uses none does not load the rest."""

import importlib
import os
from typing import Final

from xvd.engines.interface import Engine, Opening, Scheme
from xvd.engines.text import parse_options
from xvd.errors import ConfigError

FORM: Final = "rbd:POOL/IMAGE[,id=USER][,conf=FILE]"


def _open(rest: str, how: Opening) -> Engine:
    name, _, more = rest.partition(",")
    options = parse_options(more)
    path, _, snapshot = name.partition("@")
    parts = path.split("/")
    if len(parts) not in (2, 3) or not all(parts) or options.keys() - {"id", "conf"}:
        raise ConfigError(f"rbd:{rest} names no image; write {FORM}")
    conf = options.get("conf", "")
    if conf and not os.path.isfile(conf):
        raise ConfigError(f"rbd:{rest}: there is no file {conf}")
    library = importlib.import_module("xvd.engines.rbd.library")
    module = importlib.import_module("xvd.engines.rbd.engine")
    pool, *namespace, image = parts
    where = library.Where(pool, "".join(namespace), image, snapshot, options.get("id", ""), conf)
    engine: Engine = module.RbdEngine(where, read_only=how.read_only, patience_s=how.patience_s)
    return engine


SCHEMES: Final = (Scheme("rbd", FORM, "an image of a Ceph cluster", _open),)
