# SPDX-License-Identifier: Apache-2.0
"""The shared ring of either end: every move of its indices, and every look at them."""
