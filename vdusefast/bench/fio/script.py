"""Jobs as people write them: fio's command line and job files as sections of lines, and back.

`fio --showcmd` cannot do this: it makes a second job of a section that has `name=`, forgets quotes, loses the jobs of
the command line, and mixes the globals of several files. So lines that do not name the target stay as they are.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vdusefast.bench.fio.arguments import WITH_VALUE, WITHOUT_VALUE, Argument, canonical
from vdusefast.errors import ConfigError

INCLUDES_MAX = 64  # files within files: one that includes itself would never end
LINE_MAX_CHARS = 1 << 16


@dataclass(frozen=True)
class Line:
    """An option of a section. text: as it was written. value: None where it has none, variables replaced."""

    name: str
    value: str | None
    text: str
    where: str


@dataclass
class Section:
    """A job, or global options for the jobs after it."""

    name: str
    is_global: bool
    lines: list[Line] = field(default_factory=list)
    added: dict[str, str | None] = field(default_factory=dict)  # by us, after the lines


@dataclass
class Source:
    """The command line (path None), or a job file. Global options of one file do not reach the next."""

    path: Path | None
    sections: list[Section]


@dataclass
class Job:
    """A job with all that applies to it: global options first, then its own."""

    name: str
    section: Section
    options: dict[str, str | None]

    def get(self, name: str) -> str | None:
        """Return the value of an option, None where it is not given."""
        return self.options.get(name)

    def is_set(self, name: str) -> bool:
        """Return whether a switch is on."""
        return name in self.options and self.options[name] not in ("0",)


@dataclass
class Script:
    """All that fio gets. main: options of fio itself. own: ours, by name, with their place."""

    main: list[Argument]
    own: dict[str, tuple[str, str]]
    sources: list[Source]

    def option(self, name: str) -> str | None:
        """Return the value of an option of fio itself, "" for one without a value, None when it is not given."""
        values = [argument.value or "" for argument in self.main if argument.name == name]
        return values[-1] if values else None

    def jobs(self) -> list[Job]:
        """Return the jobs that fio will run, in its order."""
        wanted = {argument.value for argument in self.main if argument.name == "section"}
        jobs: list[Job] = []
        common: dict[str, str | None] = {}
        for place, source in enumerate(self.sources):
            common = common if place < 2 else {}  # the command line's globals reach the first file
            for section in source.sections:
                options = {line.name: line.value for line in section.lines}
                if section.is_global:
                    common = common | options
                elif not wanted or place > 1 or section.name in wanted:
                    options = common | options
                    jobs.append(Job(options.get("name") or section.name, section, options))
        return jobs

    def without(self, main: frozenset[str], lines: frozenset[str]) -> Script:
        """Return a script without some options of fio itself, and without some of the jobs."""
        sources = [
            replace(
                source,
                sections=[
                    replace(one, lines=[line for line in one.lines if line.name not in lines])
                    for one in source.sections
                ],
            )
            for source in self.sources
        ]
        return Script([argument for argument in self.main if argument.name not in main], self.own, sources)

    def arguments(self, directory: Path) -> list[str]:
        """Return the command line without the program; job files are written into `directory`. Raises OSError."""
        arguments = [argument.text() for argument in self.main]
        for place, source in enumerate(self.sources):
            if source.path is None:
                arguments += [argument for section in source.sections for argument in _section_arguments(section)]
                continue
            path = directory / str(place) / source.path.name
            path.parent.mkdir()
            path.write_text("".join(_section_text(section) for section in source.sections), "utf-8", "surrogateescape")
            arguments.append(str(path))
        return arguments


def _section_arguments(section: Section) -> list[str]:
    arguments = [] if section.is_global and not section.name else [f"--name={section.name}"]
    arguments += [line.text for line in section.lines]
    return arguments + [Argument(name, value).text() for name, value in section.added.items()]


def _section_text(section: Section) -> str:
    added = [name if value is None else f"{name}={value}" for name, value in section.added.items()]
    return "\n".join([f"[{section.name}]", *(line.text for line in section.lines), *added]) + "\n"


def read_script(arguments: Sequence[Argument], own: frozenset[str], own_flags: frozenset[str]) -> Script:
    """Return the script of a command line. Raises ConfigError for a job file that cannot be read."""
    script = Script([], {}, [Source(None, [Section("", is_global=True)])])
    sections, files = script.sources[0].sections, []
    for argument in arguments:
        if not argument.name:
            files.append(argument.value or "")
        elif argument.name in own:
            script.own[argument.name] = (argument.value or "", "command line")
        elif argument.name in WITH_VALUE or argument.name in WITHOUT_VALUE:
            script.main.append(argument)
        elif argument.name == "name":
            sections.append(Section(argument.value or "", is_global=(argument.value or "").startswith("global")))
        else:
            sections[-1].lines.append(Line(canonical(argument.name), argument.value, argument.text(), "command line"))
    if len(sections) == 1 and sections[0].lines and not files:
        sections.append(Section("job", is_global=False))  # options without a name make one job
    for file in files:
        script.sources.append(_read_file(file, script.own, own, own_flags))
    return script


def _read_file(name: str, found: dict[str, tuple[str, str]], own: frozenset[str], own_flags: frozenset[str]) -> Source:
    sections: list[Section] = []
    for text, where in _lines(name, sys.stdin.read() if name == "-" else None, 0):
        if text.startswith("["):
            title = text[1:256].rstrip("\n")[:-1]
            sections.append(Section(title, is_global=title.startswith("global")))
            continue
        if not sections:
            raise ConfigError(f"{where}: option {text!r} before the first section; begin with [global] or [name]")
        line = _line(text, where)
        mine = line.name.replace("-", "_")
        if mine not in own:
            sections[-1].lines.append(line)
            continue
        if not sections[-1].is_global:
            raise ConfigError(f"{where}: option {line.name!r} describes the whole run; put it into [global]")
        if line.value is None and mine not in own_flags:
            raise ConfigError(f"{where}: option {line.name!r} needs a value")
        found.setdefault(mine, (line.value if line.value is not None else "1", where))
    return Source(Path("stdin.fio" if name == "-" else name), sections)


def _line(text: str, where: str) -> Line:
    """Return an option. Variables may stand anywhere; fio replaces one that is not set by nothing."""
    name, equals, value = expand(text, os.environ).partition("=")
    return Line(canonical(name.strip()), value.strip() if equals else None, text, where)


def expand(text: str, environment: Mapping[str, str]) -> str:
    """Return `text` with `${NAME}` replaced as fio does."""
    return re.sub(r"\$\{([^}]+)\}", lambda match: environment.get(match[1], ""), text)


def _lines(name: str, text: str | None, depth: int) -> Iterator[tuple[str, str]]:
    """Yield the lines of a job file that are not empty, without comments, and their places; included files in place.

    An included file is looked for as it is named, then beside the file that names it. Raises ConfigError.
    """
    if depth > INCLUDES_MAX:
        raise ConfigError(f"{name}: files are included {depth} deep; does one include itself?")
    if text is None:
        try:
            text = Path(name).read_text("utf-8", "surrogateescape")
        except OSError as error:
            raise ConfigError(f"{name}: cannot read the job file: {error.strerror}") from None
    for number, raw in enumerate(text.split("\n"), 1):
        where = f"{name}:{number}"
        line = re.split(r"[;#]", raw, maxsplit=1)[0].strip()
        if not line:
            continue
        if len(line) > LINE_MAX_CHARS:
            raise ConfigError(f"{where}: the line is longer than {LINE_MAX_CHARS} characters")
        if not line.startswith("include"):
            if depth and line.startswith("["):
                raise ConfigError(f"{where}: fio takes no section in an included file")
            yield line, where
            continue
        wanted = line[len("include") + 1 :].strip()
        beside = Path(name).parent / wanted
        yield from _lines(wanted if Path(wanted).exists() else str(beside), None, depth + 1)
