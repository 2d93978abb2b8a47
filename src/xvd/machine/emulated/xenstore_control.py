# SPDX-License-Identifier: Apache-2.0
"""What ``xenstore-control`` can ask of the store: check, log, print, quota, quota-soft, help.

The idea to read it by: these are for an administrator, so the texts have C xenstored's form, but
only what this store really has is listed: its quotas are those of `Quotas`, and it has no log.
"""

from typing import Final

from xvd.errors import XenstoreError
from xvd.machine.emulated.xenstore_state import StoreState
from xvd.machine.xs.messages import parse_c_uint

_QUOTAS: Final = (
    ("nodes", "nodes", "Nodes per domain"),
    ("watches", "watches", "Watches per domain"),
    ("transactions", "transactions", "Transactions per domain"),
    ("transaction-nodes", "transaction_nodes", "Max. number of accessed nodes per transaction"),
    ("node-size", "node_size", "Max. size of a node"),
    ("path-max", "path_max", "Max. length of a node path"),
    ("permissions", "permissions", "Max. number of permissions per node"),
)

_COMMANDS: Final = {
    "check": "",
    "print": "<string>",
    "quota": "[set <name> <val>|<domid>]",
    "help": "",
}


def control(store: StoreState, arguments: list[str]) -> str:
    """The answer to one command line; raises `XenstoreError` EINVAL if it is none."""
    match arguments:
        case ["check"] | ["print", _]:
            return "OK"
        case ["help"]:
            return "".join(f"{command}\t{usage}\n" for command, usage in _COMMANDS.items())
        case ["quota"]:
            lines = (
                f"{name:<17}: {getattr(store.quotas, field):8} {text}\n"
                for name, field, text in _QUOTAS
            )
            return "Quota settings:\n" + "".join(lines)
        case ["quota", "set", name, value]:
            _set_quota(store, name, parse_c_uint(value))
            return "OK"
        case ["quota", domid]:
            return _usage(store, parse_c_uint(domid))
    raise XenstoreError("EINVAL", "check, print <string>, quota and help are the commands")


def _set_quota(store: StoreState, name: str, value: int) -> None:
    fields = {quota: field for quota, field, _ in _QUOTAS}
    if name not in fields or not 1 <= value < 2**31:
        raise XenstoreError("EINVAL", f"no quota {name} can be set to {value}")
    setattr(store.quotas, fields[name], value)


def _usage(store: StoreState, domid: int) -> str:
    domain = store.domains.find(domid)
    if domain is None:
        raise XenstoreError("ENOENT", f"domain {domid} is not known")
    counts = {
        "nodes": domain.nodes,
        "watches": domain.watches,
        "transactions": domain.transactions,
    }
    lines = (f"{name:<16}: {count:8}\n" for name, count in counts.items())
    return f"Domain {domid}:\n" + "".join(lines)
