# SPDX-License-Identifier: Apache-2.0
"""The deterministic simulator: the shipped queues under a virtual clock and a seeded scheduler."""
