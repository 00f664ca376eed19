"""Limits of its memory that a process was begun with (`ulimit -d`, `ulimit -v`), on Linux.

Both count what is mapped, touched or not, where a plan counts what is resident. So a process that is to be held to a
bound lets little be mapped that is never touched (`allocator.share`). What it maps for data (RLIMIT_DATA) is then about
what is resident, as code is not counted; all that it maps (RLIMIT_AS) is half a gigabyte more.
"""

import sys
from dataclasses import dataclass

from lowres_ft import allocator
from lowres_ft.allocator import Taken


@dataclass(frozen=True)
class Outside:
    """A limit of the system."""

    name: str
    most: int
    """In bytes."""

    def counted(self, now: Taken) -> int:
        """Bytes that count against it."""
        return now.data if self.name == "RLIMIT_DATA" else now.mapped

    def left(self, now: Taken) -> int:
        """Bytes that a process may still have, less than nothing where it has more than it may."""
        return self.most - self.counted(now)

    def may_be_resident(self, now: Taken) -> int:
        """Bytes that may be resident: all, but for what is mapped and is not."""
        return self.most - max(0, self.counted(now) - now.resident)


def found() -> tuple[Outside, ...]:
    """Those that hold this process now."""
    if sys.platform != "linux":
        return ()
    import resource

    told = {name: resource.getrlimit(getattr(resource, name))[0] for name in ("RLIMIT_DATA", "RLIMIT_AS")}
    return tuple(Outside(name, most) for name, most in told.items() if most != resource.RLIM_INFINITY)


def tightest() -> tuple[str, int] | None:
    """The limit by which least may be resident in this process, and how many bytes; None where there is none."""
    limits = found()
    if not limits:
        return None
    now = allocator.taken()
    return min(((limit.name, limit.may_be_resident(now)) for limit in limits), key=lambda one: one[1])


def within(most: int) -> int:
    """Bytes that this process may have, of so many that it is to have at the most."""
    limit = tightest()
    return most if limit is None else min(most, limit[1])


def named(most: int) -> str:
    """In words: which of them lets this process have `most` bytes, where one lets it have no more."""
    limit = tightest()
    return f" by {limit[0]}, which the system sets" if limit is not None and limit[1] <= most else ""
