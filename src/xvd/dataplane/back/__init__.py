# SPDX-License-Identifier: Apache-2.0
"""The backend's queue: take a request, judge it, reach its grants, ask the storage, answer."""
