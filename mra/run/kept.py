"""Results that are made once and kept on disk, until their key changes.

Beside each result lies its key, JSON of all that decides it: branch.safetensors has branch.key.json.
"""

import json
from collections.abc import Callable
from pathlib import Path

from mra.data.files import harmless, read_json, write_json
from mra.run.machine import Machine, claimed


def kept(path: Path, key: dict, machine: Machine, make: Callable[[], None]) -> None:
    """Call `make`, which writes `path`, unless `path` exists with this key. The folder is locked meanwhile."""
    with claimed(path.parent, machine):
        if is_kept(path, key, machine):
            machine.say(f"{path} is there.")
        else:
            make()
            machine.first(lambda: remember(path, key))


def is_kept(path: Path, key: dict, machine: Machine) -> bool:
    """Whether `path` exists with this key. If it has another key, says what differs."""
    if not path.exists():
        return False
    different = [f"it has no {key_file(path).name} that says how it was made"]
    if key_file(path).exists():
        different = changes(read_json(key_file(path)), key)
    if different:
        machine.say(f"{path} is made anew: {'; '.join(different)}.")
    return not different


def remember(path: Path, key: dict) -> None:
    """Write the key of a finished result."""
    write_json(key_file(path), key)


def key_file(path: Path) -> Path:
    return path.with_name(path.stem + ".key.json")


def changes(before: dict, now: dict, within: str = "") -> list[str]:
    """A sentence for every value that differs between two keys. Digests, named "content of", are not shown."""
    now, found = json.loads(json.dumps(now)), []        # `before` was read from a file: its tuples are lists
    for name in before | now:
        was, is_now = before.get(name, "nothing"), now.get(name, "nothing")
        if isinstance(was, dict) and isinstance(is_now, dict):
            found += changes(was, is_now, f"{within}{name}.")
        elif was != is_now and name.startswith("content of"):
            found.append(f"the {name} has changed")
        elif was != is_now:
            found.append(f"{within}{name} was {harmless(was)} and is {harmless(is_now)}")
    return found
