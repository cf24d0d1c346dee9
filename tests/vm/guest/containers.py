"""podman in a guest: its files come from Debian packages in the kit's cache, as links where this machine lacks them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import guest
import tree_links

TREE = ("bookworm", ("podman",))
PROGRAMS = ("podman", "conmon", "crun")
ROOT = guest.WORK / "root"
SHARED = Path("/srv/vdusefast")
DOCUMENT = (guest.CHECKOUT / "docs/containers.md").read_text()
# Neither systemd nor a journal is here.
SETTINGS = {
    "storage.conf": '[storage]\ndriver = "vfs"\ngraphroot = "/tmp/podman"\nrunroot = "/run/podman"\n',
    "containers.conf": '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n',
}


def block(heading: str, number: int = 0) -> str:
    """Return a block of commands of docs/containers.md."""
    section = DOCUMENT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[number]


def prepare() -> None:
    """Make podman work, give containers a root with vdusefast in it, and have a configuration and its store."""
    tree_links.link(TREE, {"usr/bin": PROGRAMS, "usr/share/containers": (), "etc/containers": ()})
    for name, text in SETTINGS.items():
        path = Path("/etc/containers") / name
        path.unlink(missing_ok=True)
        path.write_text(text)
    if not os.path.ismount("/sys/fs/cgroup"):
        guest.sh("mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup")
    command = Path("/usr/local/bin/vdusefast")
    command.unlink(missing_ok=True)
    command.symlink_to(guest.CHECKOUT / ".venv/bin/vdusefast")
    ROOT.mkdir()
    guest.sh("mount", "--bind", "/", ROOT)
    SHARED.mkdir(parents=True, exist_ok=True)
    with (SHARED / "disk.img").open("wb") as file:
        file.truncate(64 * guest.MIB)
    text = f'[device]\nname = "vd0"\nqueues = 2\n[backend]\nuri = "file:{SHARED}/disk.img"\n'
    (SHARED / "vd0.toml").write_text(text)


def clean_up() -> None:
    """End all containers, and undo `prepare` as far as it would be seen."""
    guest.attempt("podman", "rm", "--force", "--all", timeout_s=60)
    for place in (ROOT, "/sys/fs/cgroup"):
        guest.attempt("umount", "-l", place)
