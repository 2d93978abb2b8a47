# SPDX-License-Identifier: Apache-2.0
"""A Xen machine in user space: memory, grants, event channels and a xenstore."""
