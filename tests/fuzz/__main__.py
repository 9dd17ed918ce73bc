"""`python tests/fuzz [CASES] [TARGET ...]`: so many damaged inputs to every reader, 20,000 by default.

What is no InputError, takes more than a second of computing or 200 MB of memory is told, with the number of the case:
`python tests/fuzz +NUMBER TARGET` runs that one alone.
"""

import os
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]


def main(cases: str = "20000", *names: str) -> None:
    """Run, and exit with 1 if there was a fault."""
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["NUMOE_HOME"] = str(Path(temporary) / "home")
        from fuzz.mutate import seeded
        from fuzz.targets import targets

        from numoe.quant.errors import InputError

        faults = 0
        numbers = [int(cases)] if cases.startswith("+") else range(int(cases))
        for target in targets(Path(temporary)):
            if names and target.name not in names:
                continue
            slowest, before, told, refused = 0.0, _peak(), set(), 0
            for number in numbers:
                data, begun = seeded(target.mutate, target.seeds, number), time.process_time()
                fault = None
                try:
                    target.read(data)
                except InputError as error:
                    refused += 1
                    fault = "a long sentence" if len(str(error)) > 2000 else None
                except BaseException as error:
                    frame = traceback.extract_tb(error.__traceback__)[-1]
                    fault = f"{type(error).__name__}: {str(error)[:100]!r} at {frame.filename}:{frame.lineno}"
                    where = type(error).__name__, frame.filename, frame.lineno
                else:
                    where = ()
                seconds = time.process_time() - begun
                slowest = max(slowest, seconds)
                if seconds > 1:
                    fault, where = f"{seconds:.1f} s", ("slow",)
                if fault:
                    faults += 1
                    if fault and where not in told:
                        told.add(where)
                        print(f"  {target.name} {number}: {fault}", flush=True)
            grown = (_peak() - before) >> 20
            faults += grown > 200
            print(
                f"{target.name}: {len(numbers)} cases, {refused} refused, slowest {slowest:.2f} s, {grown} MB",
                flush=True,
            )
    sys.exit(faults > 0)


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(*sys.argv[1:])
