"""Debian packages of suites that this machine does not use, fetched by name and unpacked.

apt does the work, with sources, lists and a cache of its own in a temporary directory: what apt knows and keeps on this
machine is neither used nor changed. The mirror is the one that the machine's own sources name.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from bench.vm.errors import GuestError
from bench.vm.tools import run_tool

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DEBIAN_SUITES = {
    *("oldoldstable", "oldstable", "stable", "testing", "unstable", "sid"),
    *("buster", "bullseye", "bookworm", "trixie", "forky", "duke"),
}
UPDATE_LIMIT_S = 600
DOWNLOAD_LIMIT_S = 1800
UNPACK_LIMIT_S = 600


class Packages:
    """The packages of some Debian suites. `directory` holds apt's state and is the caller's to remove.

    Raises GuestError where apt is missing, knows no Debian mirror, or cannot reach it.
    """

    def __init__(self, suites: list[str], directory: Path) -> None:
        self._suites = suites
        self._directory = directory.resolve()
        for name in ("state/lists/partial", "cache/archives/partial", "debs"):
            (self._directory / name).mkdir(parents=True)
        (self._directory / "state/status").touch()
        mirror = debian_mirror()
        trusted = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
        sources = [f"deb {trusted}{mirror} {suite} main\n" for suite in suites]
        (self._directory / "sources.list").write_text("".join(sources))
        self._config = self._directory / "apt.conf"
        self._config.write_text(self._configuration())
        self._apt("apt-get", "update", limit_s=UPDATE_LIMIT_S)

    def _configuration(self) -> str:
        """Return apt's configuration: how this machine reaches its mirrors (proxies), and nothing else of its own.

        The system's hooks stay out: they may clean up the system's caches.
        """
        dump = run_tool(["apt-config", "dump", "Acquire"], limit_s=60)
        own = {
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::sourcelist": str(self._directory / "sources.list"),
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State": str(self._directory / "state"),
            "Dir::State::status": str(self._directory / "state/status"),
            "Dir::Cache": str(self._directory / "cache"),
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Sandbox::User": "root",  # the directory is not one that apt's own user could enter
            "APT::Update::Error-Mode": "any",
            "Acquire::Retries": "3",
        }
        lines = [line for line in dump.splitlines() if not line.startswith("Acquire::Languages")]
        lines += [f'{key} "{value}";' for key, value in own.items()]
        return "\n".join([*lines, 'Acquire::Languages { "none"; };', ""])

    def _apt(self, *arguments: str, limit_s: float) -> str:
        # apt reads APT_CONFIG before the files that the lines above turn off.
        return run_tool(
            list(arguments), limit_s=limit_s, env={**os.environ, "APT_CONFIG": str(self._config)}, cwd=self._debs
        )

    @property
    def _debs(self) -> Path:
        return self._directory / "debs"

    def names(self) -> list[str]:
        """Return the names of all packages."""
        return self._apt("apt-cache", "pkgnames", "linux-", limit_s=60).split()

    def fields(self, name: str) -> dict[str, str]:
        """Return the control fields of the newest version of a package. Raises GuestError where there is none."""
        text = self._apt("apt-cache", "--no-all-versions", "show", name, limit_s=60)
        if not text.strip():
            raise GuestError(f"there is no package {name} in {', '.join(self._suites)} on the mirror of this machine")
        return dict(re.findall(r"^([A-Z][\w-]*): (.*)$", text, re.MULTILINE))

    def unpack(self, names: list[str], into: Path) -> None:
        """Fetch packages (NAME or NAME=VERSION) and unpack all their files below `into`."""
        self._apt("apt-get", "download", *names, limit_s=DOWNLOAD_LIMIT_S)
        self._unpack_all(self._debs, into)

    def unpack_with_dependencies(self, names: list[str], into: Path) -> None:
        """Fetch packages with everything that they depend on, and unpack all their files below `into`.

        Besides a name, apt takes NAME=VERSION and a pattern, such as ?essential. Recommended packages stay out.
        """
        arguments = ("--yes", "--no-install-recommends", "--download-only", "install")
        self._apt("apt-get", *arguments, *names, limit_s=DOWNLOAD_LIMIT_S)
        self._unpack_all(self._directory / "cache/archives", into)

    @staticmethod
    def _unpack_all(packages: Path, into: Path) -> None:
        for package in sorted(packages.glob("*.deb")):
            run_tool(["dpkg-deb", "--extract", str(package), str(into)], limit_s=UNPACK_LIMIT_S)
            package.unlink()


def debian_mirror() -> str:
    """Return the address of the Debian archive that this machine's own package sources name.

    VDUSEFAST_VM_MIRROR overrides it: where the sources are not Debian's. Raises GuestError where there is none.
    """
    if mirror := os.environ.get("VDUSEFAST_VM_MIRROR"):
        return mirror
    if shutil.which("apt-get") is None:
        raise GuestError("the guest's kernels come from Debian packages, and there is no apt-get here to get them")
    targets = run_tool(["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)"], limit_s=60)
    for line in targets.splitlines():
        match line.split():
            case [uri, release, "main"] if release in DEBIAN_SUITES:
                return uri
    raise GuestError(
        "this machine's package sources name no Debian mirror; set VDUSEFAST_VM_MIRROR to the address of one"
    )
