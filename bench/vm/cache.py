"""Files that guests need and this machine lacks: kernels with modules and headers, libblkio, programs of other suites.

Each comes from a Debian package once, by name, and stays in a cache outside of the checkout. An entry is a directory
that appears as a whole; a cached one is used without asking the network.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import lzma
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.vm import old_kernel, vmlinux
from bench.vm.errors import GuestError
from bench.vm.packages import Packages
from bench.vm.tools import run_tool

SUITES = {"6.12": "bookworm-backports", "7.3": "trixie-backports"}
KERNELS = tuple(SUITES)
ALL_KERNELS = (old_kernel.SERIES, *KERNELS)  # the first takes a minute to build
LIBBLKIO_SUITE = "trixie"
LAYOUT_PACKAGE = "base-files"  # has /bin, /lib and so on, which are links into /usr
TREE_LEAVES_OUT = ("doc", "info", "lintian", "locale", "man")  # of usr/share
HEADERS = ("vduse.h", "vdpa.h")

# The initramfs of the guest needs these: they are loaded before the root file system is there.
BOOT_MODULES = ("9pnet_virtio", "9p", "overlay")
# For the commands to load. Those in the second list are part of one of the two kernels, or absent, in the other.
MODULES = (
    *("vdpa", "vduse", "virtio_vdpa", "vhost_vdpa", "virtio_blk", "virtio_net"),
    *("loop", "nbd", "null_blk", "ublk_drv", "dm_log_writes", "dm_flakey"),
    *("ext4", "xfs", "erofs", "scsi_debug", "sd_mod"),
    *("raid1", "dm_mod", "dm_crypt"),
)
MODULES_WHERE_SEPARATE = (
    *("crc32c_generic", "crc32c_intel", "crc32c_cryptoapi", "libcrc32c"),
    *("xts", "ecb", "aes_generic", "aesni_intel"),  # what dm_crypt asks for by name
)
# For the programs that others test with (tests/vm/test_other_suites.py), where Debian builds them of a kernel.
SUITE_MODULES = ("btrfs", "bfq", "kyber_iosched")

OLD_BOOT_MODULES = ("virtio_pci", "virtio_console", *BOOT_MODULES)
OLD_MODULES = tuple(name for name in MODULES if name != "ublk_drv")


@dataclass(frozen=True)
class Kernel:
    """A cached kernel: `release` as uname says, an image that qemu starts, and modules for modprobe."""

    series: str
    release: str
    image: Path
    modules: Path  # what belongs at /lib/modules/RELEASE
    boot_modules: tuple[Path, ...]  # in the order in which they have to be inserted


def directory() -> Path:
    """Return where cached things are, whether it exists or not."""
    if own := os.environ.get("VDUSEFAST_VM_CACHE"):
        return Path(own).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "vdusefast/vm"


def kernel(series: str) -> Kernel:
    """Return a kernel, from the cache or else from Debian. Raises GuestError where it cannot be had."""
    if series not in ALL_KERNELS:
        raise GuestError(f"there is no kernel {series} here; there are {', '.join(ALL_KERNELS)}")
    make = _make_old_kernel if series == old_kernel.SERIES else _make_kernel
    entry = _entry(f"kernel-{series}", lambda into: make(series, into), _recipe(make))
    about = json.loads((entry / "about.json").read_text())
    modules = entry / "modules/lib/modules" / about["release"]
    boot_modules = tuple(modules / name for name in about["boot_modules"])
    return Kernel(series, about["release"], entry / "vmlinux", modules, boot_modules)


def headers(series: str) -> Path:
    """Return an include directory with the <linux/vduse.h> of a kernel. Raises GuestError where it cannot be had."""
    return _entry(f"headers-{series}", lambda into: _make_headers(series, into), repr(HEADERS))


def libblkio() -> Path:
    """Return libblkio's shared library. Raises GuestError where it cannot be had."""
    return _entry("libblkio", _make_libblkio, LIBBLKIO_SUITE) / "libblkio.so.1"


def tree(suite: str, names: Sequence[str]) -> Path:
    """Return a directory with the files of some packages of a Debian suite and of all their dependencies.

    Its layout is that of a root file system: `chroot` runs its programs. No package's scripts have run: there are no
    users, no alternatives, no caches. Documentation and translations are left out. `names` are as apt takes them: for a
    whole base system add "?essential". Raises GuestError where it cannot be had.
    """
    wanted = sorted({*names, LAYOUT_PACKAGE})
    recipe = repr((suite, wanted, TREE_LEAVES_OUT))
    return _entry(f"tree-{suite}-{names[0]}", lambda into: _make_tree(suite, wanted, into), recipe)


def _recipe(make: Callable[..., None]) -> str:
    if make is _make_old_kernel:
        return repr((old_kernel.VERSION, OLD_BOOT_MODULES, OLD_MODULES, MODULES_WHERE_SEPARATE, vmlinux.VERSION))
    return repr((make.__name__, BOOT_MODULES, MODULES, MODULES_WHERE_SEPARATE, SUITE_MODULES, vmlinux.VERSION))


def _entry(name: str, make: Callable[[Path], None], recipe: str) -> Path:
    """Return a cached directory, made by `make` where there is none yet for this recipe.

    It is made under another name and renamed when it is whole. A second process waits for the first one's.
    """
    key = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    entry = directory() / f"{name}-{key}"
    if entry.is_dir():
        return entry
    with _locked(name):
        if entry.is_dir():
            return entry
        for left_over in directory().glob(f".{name}-*"):
            shutil.rmtree(left_over)  # of a process that was killed: one that makes it holds the lock
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=directory()) as making:
            whole = Path(making) / "entry"
            whole.mkdir()
            make(whole)
            whole.rename(entry)
    return entry


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    try:
        directory().mkdir(parents=True, exist_ok=True)
        lock = os.open(directory() / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise GuestError(f"cannot write to the cache {directory()}: {error.strerror}; set VDUSEFAST_VM_CACHE") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _make_kernel(series: str, into: Path) -> None:
    """Fill a cache entry with a kernel of `series`: image, modules, and what is known about them."""
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=into.parent) as scratch:
        packages = Packages([SUITES[series]], Path(scratch) / "apt")
        release = _newest_release(packages, series)
        names = [f"linux-{part}-{release}" for part in ("base", "image", "binary", "modules")]
        there = set(packages.names())
        unpacked = Path(scratch) / "files"
        packages.unpack([name for name in names if name in there], unpacked)
        images = [*unpacked.glob("boot/vmlinuz-*"), *unpacked.glob("usr/lib/modules/*/vmlinuz")]
        trees = [tree for tree in unpacked.glob("**/lib/modules/*") if (tree / "kernel").is_dir()]
        if len(images) != 1 or len(trees) != 1:
            raise GuestError(f"Debian's packages of kernel {release} are not laid out as expected")
        _keep_kernel(into, release, images[0], trees[0])


def _make_old_kernel(series: str, into: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=into.parent) as scratch:
        _keep_kernel(into, *old_kernel.unpack(Path(scratch)), OLD_BOOT_MODULES, OLD_MODULES)


def _keep_kernel(
    into: Path,
    release: str,
    image: Path,
    tree: Path,
    boot_names: Sequence[str] = BOOT_MODULES,
    names: Sequence[str] = MODULES,
) -> None:
    """Keep what guests need of a kernel."""
    vmlinux.extract(image, into / "vmlinux")
    boot_modules = _copy_modules(tree, into / "modules", release, boot_names, names)
    (into / "about.json").write_text(json.dumps({"release": release, "boot_modules": boot_modules}))


def _newest_release(packages: Packages, series: str) -> str:
    """Return the release of the newest kernel of a series, preferably the one that linux-image-amd64 stands for."""
    pattern = re.compile(rf"linux-image-({re.escape(series)}\.\d+\+deb\d+(?:\.\d+)?-amd64)(?![\w-])")
    if current := pattern.search(packages.fields("linux-image-amd64")["Depends"]):
        return current[1]
    found = [match[1] for name in packages.names() if (match := pattern.fullmatch(name))]
    if not found:
        raise GuestError(f"Debian's {SUITES[series]} has no kernel {series} any more; the suite has moved on")
    return max(found, key=lambda release: [int(number) for number in re.findall(r"\d+", release)])


def _copy_modules(tree: Path, into: Path, release: str, boot_names: Sequence[str], names: Sequence[str]) -> list[str]:
    """Copy the modules that guests need, uncompressed, with an index for modprobe.

    Returns the paths of those for the initramfs, below lib/modules/RELEASE, each after those that it needs.
    """
    modules = {path.name.partition(".")[0].replace("-", "_"): path for path in tree.rglob("*.ko*")}
    builtin = {Path(line).stem.replace("-", "_") for line in (tree / "modules.builtin").read_text().splitlines()}
    out = into / "lib/modules" / release
    out.mkdir(parents=True)
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        if (tree / name).exists():
            shutil.copy(tree / name, out / name)
    depends: dict[str, list[str]] = {}

    def copy(name: str) -> None:
        if name in depends or name in builtin:
            return
        if name not in modules:
            raise GuestError(f"kernel {release} has no module {name}")
        target = out / str(modules[name].relative_to(tree)).removesuffix(".xz")
        target.parent.mkdir(parents=True, exist_ok=True)
        content = modules[name].read_bytes()
        target.write_bytes(lzma.decompress(content) if modules[name].suffix == ".xz" else content)
        depends[name] = [str(target.relative_to(out))]
        for needed in vmlinux.module_depends(target.read_bytes()):
            copy(needed)
            depends[name] = [*depends.get(needed, []), *depends[name]]

    for name in (*boot_names, *names):
        copy(name)
    for name in (*MODULES_WHERE_SEPARATE, *SUITE_MODULES):
        if name in modules:
            copy(name)
    run_tool(["depmod", "--basedir", str(into), release], limit_s=60)
    return list(dict.fromkeys(path for name in boot_names for path in depends.get(name, [])))


def _make_headers(series: str, into: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=into.parent) as scratch:
        packages = Packages([SUITES[series]], Path(scratch) / "apt")
        current = packages.fields(f"linux-image-{_newest_release(packages, series)}")
        # The suite may hold a newer one as well. A signed image's version has a suffix of its own in some suites.
        packages.unpack([f"linux-libc-dev={current['Version']}"], Path(scratch) / "files")
        (into / "linux").mkdir()
        for name in HEADERS:
            shutil.copy(Path(scratch) / "files/usr/include/linux" / name, into / "linux" / name)


def _make_libblkio(into: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=into.parent) as scratch:
        Packages([LIBBLKIO_SUITE], Path(scratch) / "apt").unpack(["libblkio1"], Path(scratch) / "files")
        (library,) = Path(scratch).glob("files/usr/lib/x86_64-linux-gnu/libblkio.so.1")
        shutil.copy(library, into / "libblkio.so.1")


def _make_tree(suite: str, names: list[str], into: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=into.parent) as scratch:
        Packages([suite], Path(scratch) / "apt").unpack_with_dependencies(names, into)
    for name in TREE_LEAVES_OUT:
        shutil.rmtree(into / "usr/share" / name, ignore_errors=True)
