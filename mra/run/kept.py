"""Made once, and kept on disk as long as it would be made in the same way again.

Beside each result lies its key, readable JSON of all that decides it: branch.safetensors has branch.key.json. If
today's key differs, the result is made anew, and what changed is named.
"""

import json
from collections.abc import Callable
from pathlib import Path

from mra.data.files import harmless, read_json, write_json
from mra.run.machine import Machine, claimed


def kept(path: Path, key: dict, machine: Machine, make: Callable[[], None]) -> None:
    """Call `make`, which writes `path`, unless that is there for the same key. No other run writes there meanwhile."""
    with claimed(path.parent, machine):
        if is_kept(path, key, machine):
            machine.say(f"{path} is there.")
        else:
            make()
            machine.first(lambda: remember(path, key))


def is_kept(path: Path, key: dict, machine: Machine) -> bool:
    """Whether `path` is there for this key. If it is there for another, says what differs."""
    if not path.exists():
        return False
    if key_file(path).exists():
        different = changes(read_json(key_file(path)), key)
    else:
        different = [f"it has no {key_file(path).name} that says how it was made"]
    if different:
        machine.say(f"{path} is made anew: {'; '.join(different)}.")
    return not different


def remember(path: Path, key: dict) -> None:
    """Write the key of a finished result."""
    write_json(key_file(path), key)


def key_file(path: Path) -> Path:
    return path.with_name(path.stem + ".key.json")


def changes(before: dict, now: dict, within: str = "") -> list[str]:
    """A sentence for every value of two keys that differs. A digest, whose name begins "content of", is not shown."""
    now, found = json.loads(json.dumps(now)), []        # as `before`, which was read from a file
    for name in before | now:
        was, is_now = before.get(name, "nothing"), now.get(name, "nothing")
        if isinstance(was, dict) and isinstance(is_now, dict):
            found += changes(was, is_now, f"{within}{name}.")
        elif was != is_now and name.startswith("content of"):
            found.append(f"the {name} has changed")
        elif was != is_now:
            found.append(f"{within}{name} was {harmless(was)} and is {harmless(is_now)}")
    return found
