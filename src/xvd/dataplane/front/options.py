# SPDX-License-Identifier: Apache-2.0
"""What a frontend queue is told once, when it is made."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontOptions:
    """handle: the disk's number in each request, 0 to 65535. segments_max: pages of data in one
    request, 1 to 4096, more than 11 where indirect requests are offered. block_sectors: 512-byte
    sectors of the backend's logical block; no request begins or ends inside one. wire_sector: how
    many sectors the ring counts as one: 1, or block_sectors. page_grants: grants of one guest
    page, 1, 4 or 16. persistent: grants stay from request to request. trusted: False lets the
    backend see no byte that is not data.
    """

    handle: int = 0
    segments_max: int = 11
    block_sectors: int = 1
    wire_sector: int = 1
    page_grants: int = 1
    persistent: bool = False
    trusted: bool = True
