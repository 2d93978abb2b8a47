# SPDX-License-Identifier: Apache-2.0
"""The end that serves disks to guests."""
