# SPDX-License-Identifier: Apache-2.0
"""Measurements: the data path beside the limit, the storage below it, and what people use."""
