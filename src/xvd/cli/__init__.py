# SPDX-License-Identifier: Apache-2.0
"""The command line: the only place with arguments, environment and wall clock."""
