# SPDX-License-Identifier: Apache-2.0
# Sourced by the rig's scripts: where things are, and what a suite is.
# Everything made or fetched lies below build/xen-rig; nothing is installed on the host.
rig=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=$(dirname "$rig")
work=$project/build/xen-rig
. "$project/tools/host.sh"

choose_suite() {
    case ${1-} in
    bookworm) suite=bookworm; python=3.11 ;;   # Xen 4.17, Linux 6.1
    trixie) suite=trixie; python=3.13 ;;       # Xen 4.20, Linux 6.12
    *) echo "${0##*/}: the first argument is the Debian suite: bookworm or trixie" >&2; exit 2 ;;
    esac
    out=$work/$suite
    mkdir -p "$out"
}

started=$(date +%s%N)
stage() { printf '%6.1fs  %s\n' "$((($(date +%s%N) - started) / 100000000))e-1" "$*" >&2; }
