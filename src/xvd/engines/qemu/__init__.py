# SPDX-License-Identifier: Apache-2.0
"""Image formats and network storage, by a qemu-storage-daemon of our own for each disk."""
