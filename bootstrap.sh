#!/usr/bin/env bash
# Make everything that building and testing needs: Debian packages where this user may install them, .venv, and the
# extensions, in place. Quick when nothing changed. PYTHON=... chooses the interpreter. With the argument "test" also what
# only the tests need: an emulator, and what runs in its guests.
set -euo pipefail
cd "$(dirname "$0")"
export PATH="$PATH:/usr/sbin:/sbin"

case "$*" in
    "") for_tests="" ;;
    test) for_tests=yes ;;
    *) echo "usage: ./bootstrap.sh [test]" >&2; exit 2 ;;
esac

venv=.venv
deps_stamp=$venv/.vdusefast-deps
build_stamp=$venv/.vdusefast-build

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$@" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
python_ok() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
header() { have cc && printf '#include <%s>\n' "$1" | cc -E -x c - >/dev/null 2>&1; }

# Only one set-up of a tree at a time; the lock lies on this file and ends with the process.
if have flock; then
    exec 9<bootstrap.sh
    flock 9
fi

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 /usr/bin/python3 python3.14 python3.13 python3.12 python3.11; do
        if have "$candidate" && python_ok "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
}

# One that was interrupted half-way has no pip, and is made anew.
if [ -x $venv/bin/python ] && python_ok $venv/bin/python && $venv/bin/python -c "import pip" 2>/dev/null; then
    python=$venv/bin/python
else
    python=$(find_python)
fi

# What is missing, as Debian calls it and in words.
packages=()
words=()
need() { packages+=($1); words+=("$2"); }

clang_major() {
    if have clang; then
        clang -dumpversion | cut -d. -f1
    else
        apt-cache depends clang 2>/dev/null | sed -n 's/.*Depends: clang-\([0-9]*\).*/\1/p' | head -n 1
    fi
}

list_missing() {
    packages=() words=()
    have cc && header stdio.h || need "gcc libc6-dev" "a C compiler (cc) with the C library's headers"
    have make || need make "make"
    header liburing.h || need liburing-dev "liburing's header (liburing.h)"
    have fio || need fio "fio"
    have losetup || need mount "losetup"
    local runtime="" major
    have clang && runtime=$(clang -print-file-name="libclang_rt.fuzzer-$(uname -m).a")
    have clang || need clang "clang, for the fuzz build"
    # clang prints a bare name for a file that it does not have; older ones keep it in their resource directory.
    if [ ! -e "$runtime" ] && ! ls "$(clang -print-resource-dir 2>/dev/null)"/lib/*/libclang_rt.fuzzer* >/dev/null 2>&1; then
        major=$(clang_major || true)
        need "libclang-rt-${major:-14}-dev" "clang's sanitizer and fuzzer runtime"
    fi
    [ -z "$for_tests" ] || list_missing_for_tests
    if [ -z "$python" ]; then
        need "python3 python3-dev python3-venv" "Python 3.11 or newer with its headers"
    else
        [ "$python" = $venv/bin/python ] || "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            need python3-venv "Python's venv and ensurepip modules"
        "$python" -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null ||
            need python3-dev "Python's headers (Python.h) for $python"
    fi
}

list_missing_for_tests() {
    have qemu-system-x86_64 || need qemu-system-x86 "qemu-system-x86_64, the emulator of the test guests"
    have qemu-storage-daemon || need qemu-system-common "qemu-storage-daemon, to compare with"
    have qemu-nbd || need qemu-utils "qemu-nbd, to compare with"
    have nbdkit || need nbdkit "nbdkit, to compare with"
    nbdkit python --version >/dev/null 2>&1 || need nbdkit-plugin-python "nbdkit's Python plugin, to compare with"
    header libnbd.h || need libnbd-dev "libnbd's header (libnbd.h), for stores on NBD servers"
    have certtool || need gnutls-bin "certtool, for TLS with those"
    static_busybox || need busybox-static "busybox, linked statically"
    have depmod || need kmod "depmod and modprobe"
    have zstd || need zstd "zstd, to unpack the guests' kernels"
    have setpriv || need util-linux "setpriv"
    have dpkg-deb || need dpkg "dpkg-deb, to unpack the guests' kernels"
    have mkfs.ext4 || need e2fsprogs "mkfs.ext4"
    have strace || need strace "strace, to count system calls"
    have sfdisk || need fdisk "sfdisk, for partition tables"
    have dmsetup || need dmsetup "dmsetup, for striped disks"
    have pvcreate || need lvm2 "lvm2, to see what LVM makes of a device and its store"
    have mkfs.xfs || need xfsprogs "mkfs.xfs"
    [ -x /lib/systemd/systemd ] && have systemctl || need systemd "systemd, process 1 of some test guests"
    have udevadm || need udev "udevadm and systemd-udevd"
    have dbus-daemon || need dbus "dbus-daemon"
    compgen -G "/lib/*/security/pam_systemd.so" >/dev/null || need libpam-systemd "pam_systemd, for login sessions"
    have vdpa || need iproute2 "ip and vdpa"
    header rbd/librbd.h || need librbd-dev "librbd's header (rbd/librbd.h), for the backend rbd"
    have ceph-mon || need ceph-mon "ceph-mon, the monitor of the test cluster"
    have ceph-osd || need ceph-osd "ceph-osd, its store"
    have rbd || need ceph-common "ceph and rbd"
}

# A dynamically linked one names its loader.
static_busybox() {
    local file
    for file in /bin/busybox /usr/bin/busybox; do
        if [ -e $file ] && [ -z "$(head -c 4096 $file | LC_ALL=C sed -n '/[/]ld-linux/ s/.*/yes/p')" ]; then
            return 0
        fi
    done
    return 1
}

install_missing() {
    local root=()
    local line="apt-get install --yes --no-install-recommends ${packages[*]}"
    if ! have apt-get; then
        fail "this needs, and there is no apt-get here to get it:" "${words[@]/#/  - }" "install these, then try again"
    fi
    if [ "$(id -u)" -ne 0 ]; then
        if ! have sudo || ! sudo -n true 2>/dev/null; then
            fail "these are missing:" "${words[@]/#/  - }" "type this, then try again:" \
                "  sudo apt-get update && sudo $line"
        fi
        root=(sudo -n)
    fi
    root+=(env DEBIAN_FRONTEND=noninteractive)
    say "installing ${packages[*]}"
    # A fresh machine has no package lists, an old one has lists of packages that are gone.
    if ! compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null || ! "${root[@]}" $line >/dev/null 2>&1; then
        "${root[@]}" apt-get update >/dev/null || fail "apt-get update failed; is the network there?"
        list_missing
        line="apt-get install --yes --no-install-recommends ${packages[*]}"
        "${root[@]}" $line >/dev/null || fail "this failed: $line"
    fi
}

list_missing
if [ ${#packages[@]} -gt 0 ]; then
    install_missing
    hash -r
    [ -n "$python" ] || python=$(find_python)
    [ -n "$python" ] || fail "Python 3.11 or newer is needed; $(python3 --version 2>&1) is what there is. Set PYTHON=..."
    list_missing
    [ ${#packages[@]} -eq 0 ] || fail "still missing after the installation:" "${words[@]/#/  - }"
fi

if [ "$python" != $venv/bin/python ]; then
    say "making $venv with $("$python" --version)"
    "$python" -m venv --clear $venv
    python=$venv/bin/python
fi

# The dependencies, when what asks for them has changed.
key=$({ "$python" -VV; pwd; cat pyproject.toml; } | sha256sum | cut -d' ' -f1)
if [ ! -e $deps_stamp ] || [ "$(cat $deps_stamp)" != "$key" ]; then
    say "installing Python packages into $venv"
    "$python" - >$venv/.build-requires <<'PY'
import tomllib

with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["build-system"]["requires"], sep="\n")
PY
    "$python" -m pip install --quiet --disable-pip-version-check --upgrade -r $venv/.build-requires ||
        fail "pip could not install the build tools; is the network there?"
    # An editable installation builds in place as well. The stamp has the time before it, so that an edit made
    # meanwhile counts as newer.
    touch $build_stamp.new
    PYTHONWARNINGS=ignore \
        "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[test]' ||
        fail "pip could not install vdusefast with its dependencies; the lines above say why"
    mv $build_stamp.new $build_stamp
    echo "$key" >$deps_stamp
fi

# The extensions, when a source is newer, or one of them or their identity is gone.
changed() {
    local pyx
    [ -e $build_stamp ] && [ -e vdusefast/build_id.txt ] || return 0
    for pyx in vdusefast/worker/*.pyx vdusefast/driver/*.pyx; do
        compgen -G "${pyx%.pyx}.*.so" >/dev/null || return 0
    done
    # Its library has come after the last build.
    if header rbd/librbd.h && ! compgen -G "vdusefast/backends/_rbd.*.so" >/dev/null ||
        header libnbd.h && ! compgen -G "vdusefast/backends/_nbd.*.so" >/dev/null; then
        return 0
    fi
    [ -n "$(find setup.py csrc vdusefast \( -name '*.[ch]' -o -name '*.pyx' -o -name '*.pxd' -o -path csrc -o -name setup.py \) \
        -newer $build_stamp -print -quit)" ]
}
if changed; then
    say "building the extensions"
    touch $build_stamp.new
    if ! "$python" setup.py --quiet build_ext --inplace >$venv/build.log 2>&1; then
        cat $venv/build.log >&2
        fail "the build failed; the compiler's lines are above"
    fi
    mv $build_stamp.new $build_stamp
fi
