# SPDX-License-Identifier: Apache-2.0
"""Storage: where a disk's bytes live."""
