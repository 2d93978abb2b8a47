# SPDX-License-Identifier: Apache-2.0
"""What a backend's daemon may be asked for on its control socket; see control.py."""

from collections.abc import Callable
from typing import Any

from xvd.backend.device import Device
from xvd.backend.server import Server
from xvd.cli.report import disk_figures, disk_info


def control_methods(server: Server) -> dict[str, Callable[..., object]]:
    """Each method's name and what it calls; its parameters are what is called with."""

    def of(method: Callable[..., object]) -> Callable[..., object]:
        """Call it with the disk that is named ``DOMID/VDEV``."""
        return lambda disk, **params: method(server.device(disk), **params)

    def resize(device: Device, size: int | None, shrink: bool = False) -> Any:
        return device.disk.resize(size, shrink=shrink)

    return {
        "kinds": lambda: list(server.kinds),
        "stats": lambda: [
            disk_figures(device) | {"guest_name": server.guest_name(path)}
            for path, device in server.devices.items()
        ],
        "info": of(disk_info),
        "set": server.change,
        "replace": lambda texts, overrides: server.replace(texts, overrides, {}),
        "group": server.change_group,
        "resize": of(resize),
        "pause": of(lambda device, timeout_s: device.life.pause(timeout_s)),
        "resume": of(lambda device: device.life.resume()),
        "swap": of(
            lambda device, image, timeout_s, abandon=False: device.life.swap(
                image, timeout_s, abandon=abandon
            )
        ),
        "mirror": of(lambda device, image: device.copies.mirror(image)),
        "backup": of(lambda device, image, name: device.copies.backup(image, name)),
        "forget_backup": of(lambda device, name: device.copies.forget(name)),
        "pivot": of(lambda device: device.copies.pivot()),
        "cancel_copy": of(lambda device: device.copies.cancel()),
        "snapshots": of(lambda device: device.snapshots.list()),
        "snapshot": of(
            lambda device, action, name, timeout_s: device.snapshots.change(action, name, timeout_s)
        ),
        "copy": of(lambda device: device.copies.figures()),
    }
