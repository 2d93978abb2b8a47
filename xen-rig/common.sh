# SPDX-License-Identifier: Apache-2.0
# Sourced by the rig's scripts: where things are, what a suite is, and what the host must have.
# Everything made or fetched lies below build/xen-rig; nothing is installed on the host.
rig=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=$(dirname "$rig")
work=$project/build/xen-rig

choose_suite() {
    case ${1-} in
    bookworm) suite=bookworm; python=3.11 ;;   # Xen 4.17, Linux 6.1
    trixie) suite=trixie; python=3.13 ;;       # Xen 4.20, Linux 6.12
    *) echo "${0##*/}: the first argument is the Debian suite: bookworm or trixie" >&2; exit 2 ;;
    esac
    out=$work/$suite
    mkdir -p "$out"
}

# find_python [PYTHON]: an interpreter here of the suite's version, with its headers; nothing if none.
find_python() {
    local candidate
    for candidate in "$@" /usr/bin/python3 "python$python" "$HOME"/.pyenv/versions/"$python".*/bin/python3
    do
        ! "$candidate" -c 'import os, sys, sysconfig
sys.exit(sys.argv[1] != "%d.%d" % sys.version_info[:2]
         or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' "$python" 2>/dev/null ||
            { echo "$candidate"; return; }
    done
}

# need COMMAND...: end with the line that installs what is missing; with XVD_REQUIRE_TOOLS, as
# continuous integration has it, install it. src/xvd/packages.txt says what is in which package.
need() {
    local command missing=
    for command; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$command" >/dev/null ||
            missing="$missing $(awk -v name="$command" '$1 == name { print $2 }' "$project/src/xvd/packages.txt")"
    done
    [ -n "$missing" ] || return 0
    if [ -n "${XVD_REQUIRE_TOOLS-}" ] && [ "$(id -u)" = 0 ]; then
        apt-get -qq update
        # The names are ours, and several.
        # shellcheck disable=SC2086
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing >&2
        return
    fi
    echo "${0##*/}: missing; as root: apt-get install$missing" >&2
    exit 1
}

started=$(date +%s%N)
stage() { printf '%6.1fs  %s\n' "$((($(date +%s%N) - started) / 100000000))e-1" "$*" >&2; }
