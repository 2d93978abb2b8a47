# SPDX-License-Identifier: Apache-2.0
"""Engines in front of engines: faults and policies, from the command line and in tests."""
