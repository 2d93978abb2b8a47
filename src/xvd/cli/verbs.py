# SPDX-License-Identifier: Apache-2.0
"""The verbs, in the order of the help: where each is, and what it does in a line.

The line is the first of the verb's docstring; it stands here too so that the list of verbs needs
none of their modules.
"""

from typing import Final

VERBS: Final = {
    "serve": ("serve.serve", "Serve each IMAGE through a Xen ring on an emulated host, and offer "
              "the disks as NBD exports."),
    "host": ("host.host", "Run an emulated Xen host: its xenstore at DIRECTORY/socket, its machine "
             "at DIRECTORY/machine."),
    "backend": ("backend.backend", "Serve the disks that the toolstack assigns to this domain."),
    "attach": ("attach.attach", "Attach a disk to a guest of an emulated host; a guest that is not "
               "there yet is made."),
    "detach": ("attach.detach", "Take a disk away from a guest of an emulated host."),
    "resize": ("resize.resize", "Give a disk another size, and tell its guest; prints the bytes "
               "that it has then."),
    "pause": ("life.pause", "Let a disk take no more requests, and wait until its storage has "
              "none."),
    "resume": ("life.resume", "Let a paused disk go on."),
    "swap": ("life.swap", "Give a disk other storage while its guest uses it; what it holds is the "
             "caller's affair."),
    "mirror": ("copies.mirror", "Make other storage the same as a disk's while its guest uses it, "
               "and move the disk there."),
    "backup": ("copies.backup", "Write a disk's content to other storage while its guest uses it."),
    "snapshot": ("snapshots.SNAPSHOT", "create, list, delete, revert"),
    "disk": ("info.DISK", "info"),
    "set": ("tune.tune", "Show or change the settings of the running backends, under xen-blkback's "
            "names."),
    "group": ("tune.group", "Show or change the limits that several disks share, under the names "
              "of libvirt's iotune."),
    "config": ("config.CONFIG", "check, show"),
    "list": ("attach.list_disks", "List the disks of an emulated host's guests, and how both ends "
             "of each stand."),
    "nbd": ("nbd.nbd", "Be the frontend of a guest's disk and offer it as an NBD export."),
    "stats": ("stats.stats", "Print the figures of every disk, by blkback's names; sectors are 512 "
              "bytes."),
    "top": ("top.top", "Show what every disk does: rates, latencies, how well persistent grants "
            "serve."),
    "exporter": ("exporter.exporter", "Offer the figures of every disk of a host to Prometheus."),
    "load": ("load.load", "Do operations on a disk as fast as it goes, and say how fast that was."),
    "bench": ("bench.bench", "Measure the data path: the experiments, or some of them. `xvd load` "
              "is a load of your own."),
    "sim": ("sim.sim", "Run the shipped queues, or both ends whole, in a simulated world, with "
            "faults."),
    "datapath": ("datapath.datapath", "Answer a call of xapi's storage interface (SMAPIv3) about "
                 "storage that xvd backend serves."),
    "doctor": ("doctor.doctor", "Check what this machine can do. Fails if the emulated machine "
               "cannot run on it."),
}  # fmt: skip
"""Each verb's module and function, or the table of the verbs behind it, and its line."""

ABOUT: Final = "Xen virtual disks: both ends of the Xen paravirtual block device, in user space."
