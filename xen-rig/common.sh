# SPDX-License-Identifier: Apache-2.0
# Sourced by the rig's scripts: where things are, and what a suite is.
# Everything made or fetched lies below build/xen-rig; nothing is installed on the host.
rig=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=$(dirname "$rig")
work=$project/build/xen-rig
. "$project/tools/host.sh"

# choose_suite SUITE: the table of the suites, and what goes with an architecture.
choose_suite() {
    debian=${1-} arch=amd64
    case ${1-} in
    bookworm) release=12 python=3.11 ;; # Xen 4.17, Linux 6.1
    trixie) release=13 python=3.13 ;;   # Xen 4.20, Linux 6.12
    # The same, and Linux with larger pages.
    arm64) debian=trixie release=13 arch=arm64 python=3.13 ;;
    *) echo "${0##*/}: the first argument is the suite: bookworm, trixie or arm64" >&2; exit 2 ;;
    esac
    suite=$1
    out=$work/$suite
    mkdir -p "$out"
    # Seconds for all tests of a boot and for one, how often a disk is attached and detached in a
    # row, in how many boots all of it is done, and which tests that have an emulated machine otherwise
    # are done here too: on an emulated CPU those of what is compiled.
    case $arch in
    amd64)
        triplet=x86_64-linux-gnu loader=lib64/ld-linux-x86-64.so.2 tools=
        qemu=qemu-system-x86_64 emulator= # the host's
        bus=pci transport=pci patience=2400 test_limit=300 cycles=100 boots=1
        everywhere=(tests/{hostile,dataplane/{back,front,loop},backend,frontend})
        more_packages=(qemu-system-xen qemu-utils qemu-system-common grub-xen-host) flavours=() built_kernels=() dom0_kernels=()
        ;;
    arm64)
        triplet=aarch64-linux-gnu loader=lib/ld-linux-aarch64.so.1 tools=aarch64-linux-gnu-
        qemu=qemu-system-aarch64 emulator=trixie # of 7.2 a CPU loses its timer sooner
        bus=mmio transport=device
        patience=5400 test_limit=600 cycles=10 boots=8 # this software CPU is the slower one
        everywhere=(tests/{hostile,dataplane/{back,front,loop}})
        # Kernels with larger pages beside the suite's own, /boot/vmlinux-NAME: flavours that Debian
        # has, those that `kernel` builds, as NAME:DEBIAN:VERSION, and which of them dom0 runs too.
        # XEN_KERNELS=packaged builds none.
        more_packages=() flavours=(16k) built_kernels=(64k:trixie:6.12 64k-6.1:bookworm:6.1)
        [ "${XEN_KERNELS-}" != packaged ] || built_kernels=()
        dom0_kernels=(16k 64k)
        ;;
    esac
}

started=$(date +%s%N)
stage() { printf '%6.1fs  %s\n' "$((($(date +%s%N) - started) / 100000000))e-1" "$*" >&2; }
