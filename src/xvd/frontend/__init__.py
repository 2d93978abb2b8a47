# SPDX-License-Identifier: Apache-2.0
"""The end that uses a disk."""
