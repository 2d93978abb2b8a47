# SPDX-License-Identifier: Apache-2.0
"""A disk offered to ordinary tools."""
