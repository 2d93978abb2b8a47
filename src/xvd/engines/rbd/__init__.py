# SPDX-License-Identifier: Apache-2.0
"""Ceph's block devices, by librbd."""
