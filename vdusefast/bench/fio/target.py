"""Jobs that name files, nodes or other disks, turned to one device: only the options that name the target change."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from vdusefast.bench.common.tables import bytes_text
from vdusefast.bench.fio import engines
from vdusefast.bench.fio.arguments import Knowledge, names
from vdusefast.bench.fio.numbers import Numbers
from vdusefast.bench.fio.places import Need, Range, need_of, place, place_options, required_bytes
from vdusefast.bench.fio.script import Job, Line, Script, Section
from vdusefast.errors import ConfigError

# Options that name, make, count or remove files. A device is one file, which is there and stays.
OF_FILES = names(
    "filename directory opendir filename_format unique_filename nrfiles openfiles file_service_type "
    "filesize file_append create_on_open create_only unlink unlink_each_loop replay_redirect lockfile"
)
NEEDS_FILES = {
    "create_only": "it makes files and does no I/O",
    "read_iolog": "a log names files of its own, which fio would open; leave read_iolog out",
}
NOTES_MAX = 6  # of ranges, before they become a count
DEFAULT_ENGINE = "psync"  # of fio, on Linux
IDLE_ENGINES = engines.WITHOUT_IO


@dataclass(frozen=True)
class Target:
    """What the jobs shall load. memory: the value for `mem` where a job gives none, "" to leave it."""

    path: str
    transport: str
    asynchronous: str  # the engine that takes the place of those for other disks
    memory: str = ""


class Retargeting:
    """Turns the jobs of a script to a device. `notes` says in a few words what was replaced."""

    def __init__(self, script: Script, know: Knowledge, transport: str, asynchronous: str):
        """Check the jobs. Raises ConfigError for jobs that make no sense on a device."""
        self._script, self._know = script, know
        self._transport, self.asynchronous = transport, asynchronous
        self.jobs = script.jobs()
        if not self.jobs and (section := script.option("section")) is not None:
            raise ConfigError(f"--section={section}: no job has this name")
        if not self.jobs:
            raise ConfigError("no job: give a job file, or --name=... --rw=... --size=...")
        self.loads = [job for job in self.jobs if self._loads(job)]
        if not self.loads:
            raise ConfigError("no job reads or writes: there is nothing for a device to do")
        numbers = Numbers(know)
        self.needs: list[Need] = [need_of(job, numbers) for job in self.loads]
        self.notes: list[str] = []

    @property
    def required_bytes(self) -> int:
        """The size of a device for these jobs, 0 when nothing says it."""
        return required_bytes(self.needs)

    def verifies(self) -> list[Job]:
        """Return the jobs that verify what they read or write."""
        return [job for job in self.loads if (job.get("verify") or "0") not in ("0", "none", "null")]

    def reads(self) -> bool:
        """Return whether a job may read what no job has written."""
        return any("read" in (job.get("rw") or "read") or "rw" in (job.get("rw") or "") for job in self.loads)

    def tolerates_errors(self) -> bool:
        """Return whether a job continues after an error."""
        return any("continue_on_error" in job.options or "ignore_error" in job.options for job in self.loads)

    def turn_to(self, target: Target, capacity_bytes: int, more: Mapping[str, str | None] | None = None) -> Script:
        """Return the script for `target`; `more` options are added to each job. Raises ConfigError when it is small."""
        ranges = place(self.needs, capacity_bytes)
        added = {
            id(need.job.section): self._added(need, where, target) | dict(more or {})
            for need, where in zip(self.needs, ranges, strict=True)
        }
        notes: dict[str, None] = {}
        sources = []
        for place_, source in enumerate(self._script.sources):
            inherited = DEFAULT_ENGINE if place_ != 1 else self._global_engine(self._script.sources[0].sections)
            sections = []
            for section in source.sections:
                lines, engine = self._lines(section, inherited, target, notes)
                inherited = engine if section.is_global else inherited
                sections.append(Section(section.name, section.is_global, lines, added.get(id(section), {})))
            sources.append(replace(source, sections=sections))
        self.notes = [*notes, *self._slice_notes(ranges)]
        return Script(self._script.main, {}, sources)

    def _loads(self, job: Job) -> bool:
        engine = _engine(job)
        engines.replacement(engine, self._transport, self.asynchronous)
        for name, reason in NEEDS_FILES.items():
            if job.is_set(name):
                raise ConfigError(f"job {job.name}: {name}: {reason}")
        if "profile" in job.options:
            raise ConfigError(f"job {job.name}: profile: a profile brings jobs of its own, on files that it names")
        return engine not in IDLE_ENGINES

    @staticmethod
    def _global_engine(sections: Sequence[Section]) -> str:
        values = [line.value for one in sections if one.is_global for line in one.lines if line.name == "ioengine"]
        return (values[-1] or DEFAULT_ENGINE) if values else DEFAULT_ENGINE

    def _lines(
        self, section: Section, inherited: str, target: Target, notes: dict[str, None]
    ) -> tuple[list[Line], str]:
        """Return the lines of a section that stay, and its engine as the job had it."""
        named = [line.value for line in section.lines if line.name == "ioengine"]
        engine = (named[-1] if named else inherited) or DEFAULT_ENGINE
        engine = engine.partition(":")[0] if engine.startswith("external") else engine
        new = engines.replacement(engine, target.transport, target.asynchronous)
        foreign = self._foreign(engine, new)
        out: list[Line] = []
        for line in section.lines:
            if line.name in OF_FILES or line.name in foreign:
                notes.setdefault(line.text.strip().removeprefix("--"))
            elif line.name == "ioengine" and new != engine:
                notes.setdefault(f"ioengine={engine} (now {new})")
                out.append(_line("ioengine", new, line))
            else:
                out.append(line)
        return out, engine

    def _foreign(self, engine: str, new: str) -> frozenset[str]:
        """Return the options of `engine` that `new` does not have."""
        if engine == new:
            return frozenset()
        theirs = self._know.engine_options(engine) | engines.OPTIONS | engines.COMMON_OPTIONS
        return theirs - self._know.engine_options(new)

    def _added(self, need: Need, where: Range | None, target: Target) -> dict[str, str | None]:
        added: dict[str, str | None] = {"filename": escaped(target.path), "allow_file_create": "0"}
        if target.memory and "mem" not in need.job.options:
            added["mem"] = target.memory
        return added | place_options(need, where)

    def _slice_notes(self, ranges: Sequence[Range | None]) -> Iterator[str]:
        placed = [(need, where) for need, where in zip(self.needs, ranges, strict=True) if where is not None]
        if len(placed) > NOTES_MAX:
            yield f"{len(placed)} jobs have ranges of their own"
            return
        for need, where in placed:
            count = need.clones if where.stride_bytes else 1
            each = f"{count} ranges of {bytes_text(where.length)}" if count > 1 else bytes_text(where.length)
            yield f"job {need.job.name}: {each} from {bytes_text(where.start)} on"


def _engine(job: Job) -> str:
    return job.get("ioengine") or DEFAULT_ENGINE


def _line(name: str, value: str, like: Line) -> Line:
    dashes = "--" if like.text.startswith("--") else ""
    return Line(name, value, f"{dashes}{name}={value}", like.where)


def escaped(path: str | os.PathLike[str]) -> str:
    """Return a path as fio takes it for one file: a colon would end its name."""
    return os.fspath(path).replace("\\", "\\\\").replace(":", "\\:")
