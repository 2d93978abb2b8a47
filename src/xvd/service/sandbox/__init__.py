# SPDX-License-Identifier: Apache-2.0
"""What a worker may reach: nothing by a name, and no more descriptors than it is given."""
