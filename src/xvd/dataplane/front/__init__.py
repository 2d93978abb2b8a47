# SPDX-License-Identifier: Apache-2.0
"""The frontend's queue: operations become requests, responses end them. And its clients."""
