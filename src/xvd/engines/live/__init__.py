# SPDX-License-Identifier: Apache-2.0
"""What a disk's owner puts in front of its storage while a guest uses it. No layers of a URI: each
is somebody's, who decides what becomes of it."""
