# SPDX-License-Identifier: Apache-2.0
"""All experiments by name."""

from collections.abc import Callable
from typing import Final

from xvd.bench import (
    cluster,
    disks,
    formats,
    isolation,
    limit,
    mirror,
    published,
    scale,
    steps,
    takeover,
    vhost,
)
from xvd.bench.report import Report
from xvd.bench.run import Run

EXPERIMENTS: Final[dict[str, Callable[[Run], Report]]] = {
    "limit": limit.limit,
    "instructions": steps.instructions,
    "storage": limit.storage,
    "nbd": limit.nbd,
    "vhost-user": vhost.vhost_user,
    "formats": formats.formats,
    "cluster": cluster.cluster,
    "mirror": mirror.mirror,
    "scale": scale.scale,
    "disks": disks.disks,
    "isolation": isolation.isolation,
    "takeover": takeover.takeover,
    "persistent": published.persistent,
    "indirect": published.indirect,
    "ring-pages": published.ring_pages,
    "queues": published.queues,
    "pressure": scale.pressure,
    "guest-pages": published.guest_pages,
}
