"""A virtual machine inside of the guest: QEMU of another Debian suite, a kernel, a busybox that obeys its serial port.

The machine has no other disk than the one under test. Its caller sends one shell command after the other and
gets its output. Its kernel has a serial port of its own, so that its messages cannot come between.
The machine is as small as it can be, since it is emulated by an emulated machine.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

sys.path.append(str(Path(__file__).resolve().parents[3]))

from bench.vm import cache, initramfs

SUITE, PACKAGES = "trixie", ("qemu-system-x86", "qemu-block-extra")
LIBRARIES = "usr/lib/x86_64-linux-gnu"
MEMORY_MIB = 192
COMMAND_S = 300.0  # an emulated machine in an emulated machine
BOOT_S = 1500.0
KERNEL_ARGUMENTS = (
    *("console=ttyS1", "rdinit=/init", "panic=-1", "loglevel=6", "mitigations=off", "nokaslr"),
    *("tsc=reliable", "no_timer_check", "lpj=4000000", "8250.nr_uarts=2", "random.trust_cpu=on", "apparmor=0"),
    *("audit=0", "ipv6.disable=1", "cryptomgr.notests", "rcupdate.rcu_expedited=1", "nowatchdog", "pci=nocrs"),
)
INIT = """#!/busybox sh
/busybox mkdir -p /proc /sys /dev /bin /tmp
/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
for module in /modules/*.ko; do insmod $module; done
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo -onlcr
echo "@ready"
while read -r line; do
    eval "$line"
    echo "@status $?"
done
"""


def initrd(modules: Mapping[str, bytes]) -> bytes:
    """Return the machine's initramfs: busybox, kernel modules in the order of insertion, the loop that obeys."""
    files = {"busybox": Path("/bin/busybox").read_bytes(), "init": INIT.encode()}
    for number, (name, data) in enumerate(modules.items()):
        files[f"modules/{number:02}-{name}"] = data
    return initramfs.archive(files, executables=("busybox", "init"))


def virtio_blk(kernel: cache.Kernel) -> dict[str, bytes]:
    """Return virtio_blk and the modules that it needs, for `initrd`."""
    listed = subprocess.run(
        ["modprobe", "-S", kernel.release, "-d", str(kernel.modules.parents[2]), "--show-depends", "virtio_blk"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    paths = map(Path, re.findall(r"^insmod (\S+)", listed.stdout, re.MULTILINE))
    return {path.name: path.read_bytes() for path in paths}


def own_library_words(root: Path, program: str) -> list[str]:
    """Return how to run a program from a tree of packages: by its own C library."""
    loader = str(root / "lib64/ld-linux-x86-64.so.2")
    return [loader, "--library-path", str(root / LIBRARIES), str(root / program)]


def qemu_words(root: Path) -> list[str]:
    """Return how to run QEMU from a tree of packages."""
    firmware = [word for name in ("qemu", "seabios") for word in ("-L", str(root / "usr/share" / name))]
    return [*own_library_words(root, "usr/bin/qemu-system-x86_64"), *firmware]


def boot_sector(directory: Path) -> bytes:
    """Return boot_sector.s, assembled."""
    source, built, linked = Path(__file__).with_name("boot_sector.s"), directory / "boot.o", directory / "boot.bin"
    for words in (
        ["as", "--32", "-o", built, source],
        ["ld", "-m", "elf_i386", "-Ttext=0x7c00", "--oformat=binary", "-o", linked, built],
    ):
        subprocess.run(words, check=True, timeout=60)
    return linked.read_bytes()


class Machine:
    """A running QEMU. A context manager; leaving it ends the machine."""

    def __init__(self, words: Sequence[str], directory: Path, cpus: int = 1):
        """Start QEMU with these words beside the usual ones; sockets and the log are in `directory`."""
        root = cache.tree(SUITE, PACKAGES)
        self.output = bytearray()
        self._read = 0
        self._serial, theirs = socket.socketpair()
        self._qmp, their_qmp = socket.socketpair()
        self._log = (directory / "qemu.log").open("w+b")
        self._kernel_log = directory / "qemu-kernel.log"
        fixed = [
            *(
                "-no-user-config",
                "-nodefaults",
                "-display",
                "none",
                "-machine",
                "pc,memory-backend=ram,usb=off,vmport=off",
            ),
            # Its time passes with its instructions: its clock would else tick at every few hundred of them. With 8 ns
            # each, loops that wait for a time take an eighth of what they take with 1 ns, and a boot almost half.
            *("-accel", "tcg,thread=single", "-icount", "shift=3", "-cpu", "Nehalem,+rdrand"),
            *("-smp", str(cpus), "-m", str(MEMORY_MIB)),
            *("-object", f"memory-backend-memfd,id=ram,size={MEMORY_MIB}M,share=on"),
            *("-chardev", f"socket,id=serial,fd={theirs.fileno()}", "-serial", "chardev:serial"),
            *("-chardev", f"file,id=kernel,path={self._kernel_log}", "-serial", "chardev:kernel"),
            *("-chardev", f"socket,id=qmp,fd={their_qmp.fileno()}", "-mon", "chardev=qmp,mode=control"),
        ]
        self.process = subprocess.Popen(
            [*qemu_words(root), *fixed, *words],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(theirs.fileno(), their_qmp.fileno()),
            env={**os.environ, "QEMU_MODULE_DIR": str(root / LIBRARIES / "qemu")},
        )
        theirs.close()
        their_qmp.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        self._serial.close()
        self._qmp.close()
        self._log.close()

    def wait_for(self, text: str, timeout_s: float = COMMAND_S) -> str:
        """Return what the machine says up to `text`, from the last wait on. Raises AssertionError where it does not."""
        deadline = time.monotonic() + timeout_s
        wanted = text.encode()
        with selectors.DefaultSelector() as selector:
            selector.register(self._serial, selectors.EVENT_READ)
            while (end := self.output.find(wanted, self._read)) < 0:
                left_s = deadline - time.monotonic()
                assert left_s > 0, f"no {text!r} within {timeout_s:g} s: {self.said()}"
                if selector.select(left_s):
                    data = self._serial.recv(1 << 16)
                    assert data, f"QEMU has ended: {self.said()}"
                    self.output += data
        said = self.output[self._read : end].decode(errors="replace")
        self._read = end + len(wanted)
        return said

    def said(self) -> str:
        """Return the end of what the machine, its kernel and QEMU have said."""
        self._log.seek(0)
        said = {
            "it": bytes(self.output),
            "its kernel": self._kernel_log.read_bytes() if self._kernel_log.exists() else b"",
            "QEMU": self._log.read(),
        }
        return "; ".join(f"{who} said {data[-2000:].decode(errors='replace')!r}" for who, data in said.items())

    def wait_until_booted(self) -> None:
        """Wait until the machine obeys."""
        self.wait_for("@ready\n", BOOT_S)

    def send(self, text: str) -> None:
        """Send text to the serial port."""
        self._serial.sendall(text.encode())

    def begin(self, command: str) -> None:
        """Have a command run; `finish` returns its output."""
        self.send(f"{command}\n")

    def finish(self, timeout_s: float = COMMAND_S) -> str:
        """Return the output of the command that was begun. Raises AssertionError where it fails."""
        output = self.wait_for("@status ", timeout_s)
        status = self.wait_for("\n")
        assert status == "0", f"status {status}: {output!r}; {self.said()}"
        return output.strip()

    def run(self, command: str, timeout_s: float = COMMAND_S) -> str:
        """Run a shell command inside and return its output. Raises AssertionError where it fails."""
        self.begin(command)
        return self.finish(timeout_s)

    def ended(self, timeout_s: float = COMMAND_S) -> int:
        """Wait until QEMU has ended and return its status."""
        return self.process.wait(timeout_s)

    def monitor(self, *commands: str) -> list[object]:
        """Give commands to QEMU's monitor (QMP) and return what they return."""
        with self._qmp.makefile("rw") as monitor:
            answers = []
            for command in ("qmp_capabilities", *commands):
                monitor.write(json.dumps({"execute": command}) + "\n")
                monitor.flush()
                while "return" not in (answer := json.loads(monitor.readline())):
                    assert "error" not in answer, answer
                answers.append(answer["return"])
        return answers[1:]
