# SPDX-License-Identifier: Apache-2.0
"""The protocol: data and pure functions. No I/O, no clock, no state outside arguments."""
