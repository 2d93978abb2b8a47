# SPDX-License-Identifier: Apache-2.0
"""The machine on real Xen, through the devices of a Linux domain; imports without any of them."""
