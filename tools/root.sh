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
    chmod 755 "$root" # a root that only root may enter is none that anybody has
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

# boot_root ROOT: start its systemd, in a control group and namespaces of its own (not of the network),
# and wait until it has started all there is; its number is then in $booted.
boot_root() {
    local group parent
    group=$(findmnt --noheadings --first-only --types cgroup2 --output TARGET)/xvd-root-$$
    mkdir "$group"
    (
        echo "$BASHPID" >"$group/cgroup.procs"
        export ROOT=$1
        exec unshare --mount --propagation private --pid --cgroup --uts --ipc --fork --kill-child \
            bash -euo pipefail -c '
                mount --bind "$ROOT" "$ROOT" # systemd wants its root to be a mount
                mount -t proc none "$ROOT/proc"
                mount -t sysfs -o ro none "$ROOT/sys"
                mount -t cgroup2 none "$ROOT/sys/fs/cgroup"
                mount -t tmpfs none "$ROOT/run"
                mount -t tmpfs -o mode=755 none "$ROOT/dev"
                cp -a /dev/{null,zero,full,random,urandom,tty} "$ROOT/dev"
                mkdir "$ROOT"/dev/{pts,shm}
                mount -t devpts -o newinstance,ptmxmode=666 none "$ROOT/dev/pts"
                ln -s pts/ptmx "$ROOT/dev/ptmx"
                mount -t tmpfs none "$ROOT/dev/shm"
                exec env -i container=unshare PATH=/usr/sbin:/usr/bin:/sbin:/bin \
                    chroot "$ROOT" /lib/systemd/systemd --show-status=no
            ' </dev/null >"$1.boot" 2>&1
    ) &
    parent=$!
    until booted=$(cat "/proc/$parent/task/$parent/children" 2>/dev/null) && booted=${booted%% *} &&
        in_booted "$1" '[[ $(systemctl is-system-running --wait) = @(running|degraded) ]]' 2>/dev/null
    do
        kill -0 "$parent" 2>/dev/null || { echo "systemd has ended: $(cat "$1.boot")" >&2; return 1; }
        sleep 0.5
    done
}

# in_booted ROOT COMMAND: run a shell command there.
in_booted() {
    nsenter --target "$booted" --mount --pid --cgroup --uts --ipc chroot "$1" env -i HOME=/root \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin bash -euo pipefail -c "$2"
}

# end_booted: end it, and all that runs in there.
end_booted() {
    [ -z "${booted-}" ] || kill -9 "$booted" 2>/dev/null || :
    local group
    group=$(findmnt --noheadings --first-only --types cgroup2 --output TARGET)/xvd-root-$$
    wait
    [ ! -d "$group" ] || find "$group" -depth -type d -exec rmdir {} +
}

# remove_root ROOT: what was mounted below belongs to a namespace that has ended, and nothing else may go.
remove_root() { rm -rf --one-file-system "$1"; }
