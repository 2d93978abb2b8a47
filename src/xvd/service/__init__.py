# SPDX-License-Identifier: Apache-2.0
"""How daemons are run and watched."""
