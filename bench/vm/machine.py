"""The guest as qemu sees it: its command line, and the initramfs with the scripts that run inside."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from bench.vm import cache, initramfs
from bench.vm.errors import GuestError
from bench.vm.tools import search_path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = "/run/results"
DISK = "/dev/vda"
GUEST_ADDRESS = "10.0.2.15"  # as qemu's user network has it
HOST_ADDRESS = "10.0.2.2"
HIDDEN = ("/tmp", "/run", "/var/tmp", "/dev/shm")  # noqa: S108 (in the guest these are its own, and empty)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

KERNEL_ARGUMENTS = (
    *("console=ttyS0", "rdinit=/init", "panic=-1", "loglevel=7"),
    *("mitigations=off", "nokaslr", "tsc=reliable", "no_timer_check", "random.trust_cpu=on"),
    # QEMU 7.2 leaves wrong flags after cmpxchg16b, direction, trap and interrupt among them. The kernel's allocator
    # uses it: an interrupt soon after it saves those flags, and they take effect at the return from it.
    "clearcpuid=cx16",
    *("apparmor=0", "audit=0", "ipv6.disable=1", "8250.nr_uarts=1", "hostname=guest"),
)
# systemd and its services write into the kernel log, with the time.
SYSTEMD_ARGUMENTS = (
    *("systemd.log_target=kmsg", "systemd.show_status=no", "systemd.journald.forward_to_kmsg=1"),
    *("systemd.journald.max_level_kmsg=info", "printk.devkmsg=on"),
)
SYSTEMD_PROGRAMS = ("systemctl", "udevadm", "dbus-daemon")


# How time passes in a guest:
#   steady   while the guest computes, by its instructions; while it waits, as on the host. So a busy host makes no
#            deadline of the guest pass too early. One thread of the host emulates all CPUs in turn.
#   host     as on the host. Each CPU is a thread of the host, so that CPUs of the guest really run side by side.
#   counted  by instructions alone: time in which the guest waits is skipped. To compare costs.
Clock = Literal["steady", "host", "counted"]
CLOCKS: tuple[Clock, ...] = get_args(Clock)
INSTRUCTION_NS = 4  # about what the emulator needs for one on an idle host
SLEEPS: dict[Clock, str] = {"steady": "sleep=on", "counted": "sleep=off"}


@dataclass(frozen=True)
class GuestConfig:
    """The kind of a guest. Sizes are as qemu writes them: 3G, 512M."""

    kernel: str = cache.KERNELS[0]
    cpus: int = 2
    memory: str = "3G"
    timeout_s: float = 120.0  # for all of it, from the start of qemu; fetching a kernel does not count
    disk: str = ""  # size of an empty virtio-blk disk, /dev/vda
    disk_image: Path | None = None  # a file to hold that disk, which stays; made if need be
    clock: Clock = "steady"
    instruction_ns: int = INSTRUCTION_NS  # a power of two, for the clocks that count: how fast the machine shows itself
    accel: str = "tcg"  # or "kvm", with the clock "host"
    kernel_arguments: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()  # loaded before the command: "NAME" or "NAME PARAMETER=VALUE"
    network: bool = (
        False  # a network card: the guest is GUEST_ADDRESS, what listens on 127.0.0.1 here is at HOST_ADDRESS
    )
    systemd: bool = False  # is process 1, with udev, D-Bus, logind and the journal; the command is a service
    over: Path | None = None  # a directory whose files lie over the host's: a tree of packages (cache.tree)
    before: str = ""  # shell commands that run before systemd starts: units, fstab, images
    results: Path | None = None  # a directory of the host that the guest may write to
    directory: Path = ROOT  # where the command runs
    environment: Mapping[str, str] = field(default_factory=dict)


def command_line(config: GuestConfig, image: Path, initrd_fd: int, ports: Sequence[int], log_fd: int) -> list[str]:
    """Return qemu's command line.

    Args:
        image: the kernel, as ELF.
        initrd_fd: a descriptor that qemu inherits, with the initramfs.
        ports: descriptors of pipes for /dev/vport0p1 and so on, inherited.
        log_fd: one for the serial port, that is, the kernel log.
    """
    return [
        *("setpriv", "--pdeathsig", "KILL"),
        *("qemu-system-x86_64", "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-machine", "pc,usb=off,vmport=off", "-rtc", "base=utc"),
        *_cpu(config),
        *("-m", config.memory, "-smp", str(config.cpus)),
        *("-kernel", str(image), "-initrd", _path(initrd_fd)),
        *("-append", " ".join([*KERNEL_ARGUMENTS, *_systemd_arguments(config), *config.kernel_arguments])),
        *("-chardev", f"file,id=log,path={_path(log_fd)}", "-serial", "chardev:log"),
        *("-device", "virtio-serial-pci"),
        *(word for number, fd in enumerate(ports, 1) for word in _port(number, fd)),
        *_directory("host", Path("/"), "readonly=on"),
        # A device of its own: overlayfs takes no layer that lies below another one.
        *(_directory("over", config.over, "readonly=on") if config.over else ()),
        *(("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=") if config.network else ()),
        *(_directory("results", config.results) if config.results else ()),
    ]


def disk_arguments(disk_fd: int) -> list[str]:
    """Return the part of the command line for a disk whose image is an inherited descriptor."""
    drive = f"if=none,id=disk,format=raw,cache=unsafe,discard=unmap,detect-zeroes=off,file={_path(disk_fd)}"
    return ["-drive", drive, "-device", "virtio-blk-pci,drive=disk"]


def _systemd_arguments(config: GuestConfig) -> tuple[str, ...]:
    return SYSTEMD_ARGUMENTS if config.systemd else ()


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _cpu(config: GuestConfig) -> list[str]:
    if config.accel == "kvm":
        return ["-accel", "kvm", "-cpu", "EPYC,-arch-capabilities"]
    # Nehalem is the least that today's numpy runs on; with rdrand the kernel has random numbers at once.
    return [*_accelerator(config), "-cpu", "Nehalem,+rdrand"]


def _accelerator(config: GuestConfig) -> list[str]:
    if config.clock == "host":
        return ["-accel", "tcg,thread=multi"]
    shift = config.instruction_ns.bit_length() - 1
    return ["-accel", "tcg,thread=single", "-icount", f"shift={shift},{SLEEPS[config.clock]}"]


def _port(number: int, fd: int) -> list[str]:
    name = f"port{number}"
    return ["-chardev", f"file,id={name},path={_path(fd)}", "-device", f"virtserialport,chardev={name},nr={number}"]


def _directory(name: str, directory: Path, *options: str) -> list[str]:
    """Return the part of the command line for a directory that the guest mounts by 9p under a name."""
    path = str(directory.resolve()).replace(",", ",,")
    fsdev = ",".join(["local", f"id={name}", f"path={path}", "security_model=none", "multidevs=remap", *options])
    return ["-fsdev", fsdev, "-device", f"virtio-9p-pci,fsdev={name},mount_tag={name}"]


def initrd(config: GuestConfig, kernel: cache.Kernel, command: Sequence[str], token: bytes) -> bytes:
    """Return the initramfs: busybox, the modules that the root needs, the scripts, and the command.

    `token` is what the guest ends the command's output with.
    """
    virtio_blk = [] if not config.disk or any(m.split()[0] == "virtio_blk" for m in config.modules) else ["virtio_blk"]
    virtio_net = ["virtio_net"] if config.network else []
    settings = {
        "release": kernel.release,
        "modules": str(kernel.modules),
        "results": RESULTS if config.results else "",
        "over": "yes" if config.over else "",
        "address": f"{GUEST_ADDRESS}/24" if config.network else "",
        "token": token.decode(),
        "preload": "\n".join([*config.modules, *virtio_blk, *virtio_net]),
        "systemd": "yes" if config.systemd else "",
    }
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in settings.items()]
    keep = " ".join(str(path) for path in _needed(config) if str(path).startswith(tuple(f"{h}/" for h in HIDDEN)))
    files = {
        "busybox": _busybox(),
        "init": (HERE / "init.sh").read_bytes(),
        **{name: (HERE / name).read_bytes() for name in ("session.sh", "systemd.sh", "run_command.sh")},
        "settings": "".join([*lines, f"keep={shlex.quote(keep)}\n"]).encode(),
        "command": _script(config, [f"exec {shlex.join(command)}"]).encode(),
        "before": _script(config, [config.before]).encode(),
    }
    for number, module in enumerate(kernel.boot_modules):
        files[f"boot/{number:02}-{module.name}"] = module.read_bytes()
    return initramfs.archive(files, executables=("busybox", "init"))


def _needed(config: GuestConfig) -> list[Path]:
    """Return the directories of the host that the guest needs, wherever they are."""
    return list(dict.fromkeys([ROOT, config.directory.resolve(), _python_prefix(), cache.directory()]))


def _python_prefix() -> Path:
    """Return where the real Python of the checkout's environment is installed: python3 on PATH may be a slow shim."""
    settings = ROOT / ".venv/pyvenv.cfg"
    if settings.exists() and (home := re.search(r"^home\s*=\s*(.+)$", settings.read_text(), re.MULTILINE)):
        return Path(home[1].strip()).parent
    return Path(sys.base_prefix)


def _script(config: GuestConfig, commands: Sequence[str]) -> str:
    """Return a shell script that runs shell commands in the guest's directory and environment."""
    environment = {
        "PATH": f"{ROOT}/.venv/bin:{_python_prefix()}/bin:{PATH}",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "VDUSEFAST_VM": config.kernel,
        "VDUSEFAST_VM_CACHE": str(cache.directory()),
        **_libblkio(),
        **({"VDUSEFAST_VM_RESULTS": RESULTS} if config.results else {}),
        **({"VDUSEFAST_VM_DISK": DISK} if config.disk else {}),
        **config.environment,
    }
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    enter = f"cd {shlex.quote(str(config.directory))} || exit 125"
    return "\n".join([*exports, enter, *commands, ""])


def _libblkio() -> dict[str, str]:
    """Return the variable that names libblkio; none where it is not cached and cannot be fetched."""
    try:
        return {"VDUSEFAST_LIBBLKIO": str(cache.libblkio())}
    except GuestError:
        return {}


def missing_tools(*, systemd: bool = False) -> list[str]:
    """Return the programs that a guest needs and this machine lacks."""
    missing = [
        name
        for name in ("qemu-system-x86_64", "setpriv", "depmod", "zstd", *(SYSTEMD_PROGRAMS if systemd else ()))
        if not shutil.which(name, path=search_path())
    ]
    return missing if _busybox() else [*missing, "busybox (statically linked)"]


def check_tools(config: GuestConfig) -> None:
    """Raise GuestError where this machine lacks a program or a right that a guest needs."""
    if missing := missing_tools(systemd=config.systemd):
        raise GuestError(f"{', '.join(missing)} missing; ./bootstrap.sh test installs or names what a guest needs")
    if config.accel == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise GuestError("/dev/kvm is not there or not for this user; leave --accel kvm out")


def _busybox() -> bytes:
    """Return a busybox that needs no loader; nothing where there is none."""
    for path in map(Path, ("/bin/busybox", "/usr/bin/busybox")):
        if path.exists() and b"/ld-linux" not in (program := path.read_bytes())[:4096]:
            return program
    return b""
