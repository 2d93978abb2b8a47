# SPDX-License-Identifier: Apache-2.0
"""One queue's thread: it steps whatever fills the table of a stepper, and sleeps in one place."""
