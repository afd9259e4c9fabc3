"""All that attacks: hours on two cores at full counts.

    python -m tests.stress                 fuzz, processes, long, precision and killed, one after another
    python -m tests.stress --share 0.05    a twentieth of the cases, steps and kills

Each stops at the first thing that is not as it should be; exit status 1 where one did.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

COUNTS = {"fuzz.py": ("--cases", 2000), "processes.py": (), "long.py": ("--steps", 2000),
          "precision.py": ("--steps", 1000), "killed.py": ("--kills", 50)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0)
    share, failed = parser.parse_args().share, []
    for script, count in COUNTS.items():
        began = time.perf_counter()
        flags = (count[0], str(max(1, round(count[1] * share)))) if count else ()
        print(f"---- {script} {' '.join(flags)}", flush=True)
        if subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *flags]).returncode:
            failed.append(script)
        print(f"---- {script}: {time.perf_counter() - began:.0f} s", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "All held.")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
