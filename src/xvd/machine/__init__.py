# SPDX-License-Identifier: Apache-2.0
"""What a domain can do: memory, grants, event channels, xenstore."""
