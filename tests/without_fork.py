"""A plugin of pytest, `-p without_fork`: the system refuses forks, as those do that have none."""

import os
from errno import ENOSYS


def _refused() -> int:
    raise OSError(ENOSYS, os.strerror(ENOSYS))


os.fork = _refused
