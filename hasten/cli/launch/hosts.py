"""Which hosts and slots a run uses: DeepSpeed's hostfile, its filters, and files of variables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from hasten.errors import ConfigError

Hosts = dict[str, tuple[str, ...]]  # name -> its slots; a slot is a GPU as CUDA_VISIBLE_DEVICES names it

HOST = re.compile(r"\w[\w.-]*")
LINE = re.compile(rf"({HOST.pattern})\s+slots=(\d+)")
VARIABLE = re.compile(r"([A-Za-z_]\w*)=(.*)")
PART = re.compile(rf"({HOST.pattern})(?::(\w[\w-]*(?:,\w[\w-]*)*))?")


def read_hostfile(path: str) -> Hosts:
    """`host slots=N` a line; slots are 0 to N - 1."""
    hosts: Hosts = {}
    seen: dict[str, int] = {}
    wrong: list[str] = []
    for number, line in _lines(path):
        found = LINE.fullmatch(line)
        if found is None:
            wrong.append(f"line {number}: {line!r} is not of the form 'host slots=N'")
        elif found[1] in seen:
            wrong.append(f"line {number}: {found[1]} stands in line {seen[found[1]]} already")
        elif int(found[2]) == 0:
            wrong.append(f"line {number}: {found[1]} has slots=0, and needs one at least")
        else:
            seen[found[1]] = number
            hosts[found[1]] = tuple(map(str, range(int(found[2]))))
    _refuse(path, wrong)
    if not hosts:
        raise ConfigError(f"{path}: no host, where lines of the form 'host slots=N' were expected")
    return hosts


def read_variables(path: str) -> dict[str, str]:
    """`NAME=value` a line; the value is taken as it stands."""
    variables: dict[str, str] = {}
    wrong: list[str] = []
    for number, line in _lines(path):
        found = VARIABLE.fullmatch(line)
        if found is None:
            wrong.append(f"line {number}: {line!r} is not of the form 'NAME=value'")
        else:
            variables[found[1]] = found[2]
    _refuse(path, wrong)
    return variables


def choose(hosts: Hosts, include: str | None, exclude: str | None) -> Hosts:
    """What is left of the hosts, in their order: `host1@host2:0,2` names all slots of one host and two of another."""
    if include and exclude:
        raise ConfigError("--include and --exclude contradict each other: give one of them")
    if include:
        named = _named("--include", include, hosts)
        return {h: tuple(s for s in hosts[h] if s in named[h]) for h in hosts if h in named}
    if exclude:
        named = _named("--exclude", exclude, hosts)
        left = {h: tuple(s for s in slots if s not in named.get(h, ())) for h, slots in hosts.items()}
        if not any(left.values()):
            raise ConfigError(f"--exclude {exclude}: no slot is left of {_told(hosts)}")
        return {h: slots for h, slots in left.items() if slots}
    return hosts


def _named(flag: str, text: str, hosts: Hosts) -> Hosts:
    """The slots that a filter names, every one of which there is."""
    named: Hosts = {}
    for part in text.split("@"):
        found = PART.fullmatch(part)
        if found is None:
            raise ConfigError(f"{flag} {text}: {part!r} is not of the form 'host' or 'host:0,2' ('@' between hosts)")
        host, slots = found[1], found[2]
        if host not in hosts:
            raise ConfigError(f"{flag} {text}: {host} is none of the hosts {', '.join(hosts)}")
        if host in named:
            raise ConfigError(f"{flag} {text}: {host} is named twice")
        named[host] = hosts[host] if slots is None else tuple(slots.split(","))
        unknown = [s for s in named[host] if s not in hosts[host]]
        if unknown:
            raise ConfigError(f"{flag} {text}: no slot {', '.join(unknown)} in {_told({host: hosts[host]})}")
        if len(set(named[host])) < len(named[host]):
            raise ConfigError(f"{flag} {text}: a slot of {host} is named twice")
    return named


def _told(hosts: Mapping[str, tuple[str, ...]]) -> str:
    return "@".join(f"{h}:{','.join(slots)}" for h, slots in hosts.items())


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Numbered lines without comments, those that say something."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not UTF-8 text (byte {e.start})") from e
    for number, line in enumerate(text.split("\n"), 1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if line:
            yield number, line


def _refuse(path: str, wrong: list[str]) -> None:
    if wrong:
        raise ConfigError(f"{path}: {'; '.join(wrong)}")
