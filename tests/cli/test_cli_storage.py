# SPDX-License-Identifier: Apache-2.0
"""What storage a disk's ``params`` node names, however the toolstack has written it."""

import pytest

from xvd.blkif.nodes import parse_backend_assignment
from xvd.cli.common import storage_uri

ASSIGNED = {"frontend": "/local/domain/7/device/vbd/51712", "frontend-id": "7"}


@pytest.mark.parametrize(
    ("params", "uri"),
    [
        ("/images/a.img", "/images/a.img"),
        ("/images/a:b.img", "/images/a:b.img"),
        ("memory:64M", "memory:64M"),
        ("aio:/images/a.img", "/images/a.img"),
        ("aio:memory:64M", "memory:64M"),
        ("file:/images/a.img", "/images/a.img"),
        ("aio:file:/images/a:b.img", "file:/images/a:b.img"),
    ],
)
def test_a_target_is_an_engines_uri_or_a_path(params: str, uri: str) -> None:
    assert storage_uri(parse_backend_assignment(ASSIGNED | {"params": params})) == uri
