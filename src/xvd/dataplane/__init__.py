# SPDX-License-Identifier: Apache-2.0
"""The compiled data plane: rings and queues, without the GIL and without allocation."""
