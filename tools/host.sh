# SPDX-License-Identifier: Apache-2.0
# Sourced, by sh or bash, with $project being this tree: what the host must have, and which Python.

# have NAME: whether a command or a file of src/xvd/packages.txt is here.
have() {
    case $1 in
        python:ensurepip) python3 -c 'import ensurepip' 2>/dev/null ;;
        python:Python.h) python3 -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2>/dev/null ;;
        /*) ls $1 >/dev/null 2>&1 ;; # a pattern
        *) PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null ;;
    esac
}

# need NAME...: end with the line that installs what is missing; with XVD_REQUIRE_TOOLS, as
# continuous integration has it, install it. src/xvd/packages.txt says what is in which package.
need() {
    local name missing=
    for name; do
        have "$name" ||
            missing="$missing $(awk -v name="$name" '$1 == name { print $2 }' "$project/src/xvd/packages.txt")"
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

# find_python [PYTHON]: an interpreter here of version $python, with its headers; nothing if none.
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
