"""The control groups that this process is in, those of a container or a service: what they allow of the machine.

`root`, in all of them, is where proc and sys are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def groups(controller: str, root: Path = ROOT) -> Iterator[tuple[bool, Path]]:
    """The folder of each group around this process, the outermost first, and whether it is of version 2."""
    for line in lines(root / "proc/self/cgroup"):
        controllers, _, path = line.partition(":")[2].partition(":")
        for kind in {"", controller} & set(controllers.split(",")):
            # Where a container sees its own group as the outermost one, the path does not exist or leads out.
            names = [] if ".." in path.split("/") else [name for name in path.split("/") if name]
            for depth in range(len(names) + 1):
                yield kind == "", root.joinpath("sys/fs/cgroup", kind, *names[:depth])


def memory_limits(root: Path = ROOT) -> Iterator[tuple[int, int]]:
    """Bytes that each group allows, and leaves to this process: what is taken but given back when needed is left."""
    for new, group in groups("memory", root):
        limits = ("memory.max", "memory.high") if new else ("memory.limit_in_bytes",)
        reclaimable = "inactive_file" if new else "total_inactive_file"
        statistics = dict(line.split(" ", 1) for line in lines(group / "memory.stat") if " " in line)
        used = _number(lines(group / ("memory.current" if new else "memory.usage_in_bytes"))) or 0
        used -= min(used, _number([statistics.get(reclaimable, "")]) or 0)
        found = (_number(lines(group / limit)) for limit in limits)
        yield from ((limit, limit - used) for limit in found if limit is not None)


def cores_left(root: Path = ROOT) -> Iterator[float]:
    """The cores' worth of time that each group may use."""
    for new, group in groups("cpu", root):
        if new:
            words = " ".join(lines(group / "cpu.max")).split()
        else:
            words = [" ".join(lines(group / f"cpu.cfs_{name}_us")) for name in ("quota", "period")]
        numbers = [_number([word]) for word in words]
        if len(numbers) == 2 and numbers[0] and numbers[1]:
            yield numbers[0] / numbers[1]


def lines(file: Path) -> list[str]:
    """Those of a file of the system; [] without it."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no control groups, or not of this version
        return []


def _number(lines: list[str]) -> int | None:
    """What a file of one number says; None for nothing, or no limit ("max", -1)."""
    return int(lines[0]) if lines and re.fullmatch(r"[0-9]{1,20}", lines[0]) else None
