"""Made once, and kept on disk as long as it would be made in the same way again.

Beside each result lies its key, readable JSON of all that decides it: branch.safetensors has branch.key.json. Where the
key of today differs, the result is made anew, and what changed is named.
"""

import json
from collections.abc import Callable
from pathlib import Path

from mra.data.files import harmless, read_json, write_json
from mra.run.machine import Machine, claimed

ABSENT = "nothing"      # stands for a value that one of two keys lacks


def kept(path: Path, key: dict, machine: Machine, make: Callable[[], None]) -> None:
    """Call `make`, which writes `path`, unless that is there for the same key. Nobody else writes there meanwhile."""
    with claimed(path.parent, machine):
        if is_kept(path, key, machine):
            machine.say(f"{path} is there.")
        else:
            make()
            machine.first(lambda: remember(path, key))


def is_kept(path: Path, key: dict, machine: Machine) -> bool:
    """Whether `path` is there for this key; where it is there for another, the difference is told."""
    if not path.exists():
        return False
    if not key_file(path).exists():
        machine.say(f"{path} is made anew: it has no {key_file(path).name} that says how it was made.")
        return False
    different = changes(read_json(key_file(path)), key)
    if different:
        machine.say(f"{path} is made anew: {'; '.join(different)}.")
    return not different


def remember(path: Path, key: dict) -> None:
    """Write the key of a finished result."""
    write_json(key_file(path), key)


def key_file(path: Path) -> Path:
    return path.with_name(path.stem + ".key.json")


def changes(before: dict, now: dict) -> list[str]:
    """A sentence for every value of two keys that differs. A digest, whose name begins "content of", is not shown."""
    old, new = flat(json.loads(json.dumps(before))), flat(json.loads(json.dumps(now)))
    found = []
    for name in old | new:
        was, is_now = old.get(name, ABSENT), new.get(name, ABSENT)
        if was != is_now and name.startswith("content of"):
            found.append(f"the {name} has changed")
        elif was != is_now:
            found.append(f"{name} was {harmless(was)} and is {harmless(is_now)}")
    return found


def flat(key: dict, prefix: str = "") -> dict:
    """A dictionary without dictionaries in it: {"a": {"b": 1}} becomes {"a.b": 1}."""
    found = {}
    for name, value in key.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
