# SPDX-License-Identifier: Apache-2.0
"""The xenstore wire protocol: messages, an asyncio client, a server."""
