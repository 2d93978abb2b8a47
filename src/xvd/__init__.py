# SPDX-License-Identifier: Apache-2.0
"""Xen virtual disks: both ends of the Xen paravirtual block device, in user space."""

__version__ = "0.1.0"
