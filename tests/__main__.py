"""All tests, in two processes side by side, since most tests keep a single core busy: python -m tests

Flags are passed on to pytest. `python -m pytest` runs the same tests one after another.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# These files take as long as all others. Those that use a set of adapt.py are together: it takes long to make.
SECOND = [f"test_{name}.py" for name in ("dad", "diffusion", "gap", "similarity", "study", "text", "town", "training")]
NO_TESTS = 5        # pytest's exit status if its flags choose no test of a half


def main() -> None:
    first = [file.name for file in HERE.glob("test_*.py") if file.name not in SECOND]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile() as said:
        command = [sys.executable, "-m", "pytest", *sys.argv[1:]]
        second = subprocess.Popen([*command, *(str(HERE / name) for name in SECOND)], env=environment, stdout=said,
                                  stderr=subprocess.STDOUT)
        try:
            statuses = [subprocess.call([*command, *(str(HERE / name) for name in sorted(first))], env=environment)]
            statuses.append(second.wait())
        finally:
            second.kill()
        said.seek(0)
        print(said.read().decode(errors="replace"), flush=True)
    failed = [status for status in statuses if status not in (0, NO_TESTS)]
    sys.exit(max(failed, default=min(statuses)))


if __name__ == "__main__":
    main()
