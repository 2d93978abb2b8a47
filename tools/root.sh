# SPDX-License-Identifier: Apache-2.0
# Sourced, by bash, as root: a Debian of its own in a directory, by debootstrap and apt's own mirror,
# and commands in it.

# make_root SUITE ROOT PACKAGE,PACKAGE...: a Debian that has these packages, and nothing else of ours.
make_root() {
    local suite=$1 root=$2 packages=$3 mirror file
    mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -m1 '/debian/*$') || mirror=
    # shellcheck disable=SC2086  # no mirror is no word
    debootstrap --variant=minbase --include="$packages" "$suite" "$root" $mirror >"$root.log" 2>&1 ||
        { tail -n 20 "$root.log" >&2; rm -f "$root.log"; return 1; }
    rm -f "$root.log"
    # How this machine reaches its package registries; updates too, of its own suite.
    for file in /etc/resolv.conf /etc/hosts /etc/pip.conf; do
        [ ! -e "$file" ] || cp -L "$file" "$root$file"
    done
    if [ "$suite" = "$(. /etc/os-release && echo "$VERSION_CODENAME")" ]; then
        for file in /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources; do
            [ ! -e "$file" ] || cp -L "$file" "$root$file"
        done
    fi
    if [ -n "${SSL_CERT_FILE-}" ]; then # a package may write its own where the system's lie
        cp -L "$SSL_CERT_FILE" "$root/etc/registries.crt"
    fi
}

# in_root ROOT COMMAND: run a shell command in it, in a mount namespace of its own: whatever is mounted
# in there ends with it.
in_root() {
    (
        if [ -e "$1/etc/registries.crt" ]; then
            export SSL_CERT_FILE=/etc/registries.crt PIP_CERT=/etc/registries.crt
            export REQUESTS_CA_BUNDLE=$SSL_CERT_FILE CURL_CA_BUNDLE=$SSL_CERT_FILE
        fi
        export ROOT=$1 COMMAND=$2
        unshare --mount --propagation private bash -euo pipefail -c '
            mount --rbind /dev "$ROOT/dev"
            mount -t proc none "$ROOT/proc"
            mount --rbind /sys "$ROOT/sys"
            mount -t tmpfs none "$ROOT/run"
            exec env -u PIP_FIND_LINKS PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
                HOME=/root chroot "$ROOT" bash -euo pipefail -c "$COMMAND"'
    )
}

# remove_root ROOT: what was mounted below belongs to a namespace that has ended, and nothing else may go.
remove_root() { rm -rf --one-file-system "$1"; }
