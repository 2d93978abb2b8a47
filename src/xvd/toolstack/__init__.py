# SPDX-License-Identifier: Apache-2.0
"""What xl and libxl do for a disk, where there is no xl: on an emulated host, and in tests."""
