# SPDX-License-Identifier: Apache-2.0
"""What either end of a device of any paravirtual kind does by xenstore, and the links it has."""
