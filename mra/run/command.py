"""The command line of a script, and its errors as one sentence."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from dataclasses import fields
from typing import TypeVar

from mra.config import UserError, check_values
from mra.data.files import harmless

Config = TypeVar("Config")


def parse(kind: type[Config], doc: str, argv: list[str] | None = None,
          recipe_of: Callable[[Config], dict] = lambda config: {}) -> Config:
    """Make a configuration from flags: `kind`'s defaults, then `recipe_of` the result, then the flags given.

    Raises UserError for an unknown flag, or a value of the wrong type or out of its range; prints help and exits for
    --help.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)

    def refuse(message: str) -> None:
        raise UserError(f"{message}; --help lists the flags.")

    parser.error = refuse
    usual = kind(**recipe_of(kind()))
    for field in fields(kind):
        text = field.metadata["text"]
        if field.metadata["choices"]:
            text += f": {', '.join(field.metadata['choices'])}"
        text += f" (default: {getattr(usual, field.name)!r})"
        if field.type is bool:
            takes = dict(action=argparse.BooleanOptionalAction)
        elif field.type == tuple[str, ...]:
            takes = dict(nargs="+")
        else:
            takes = dict(type=field.type)
        parser.add_argument("--" + field.name.replace("_", "-"), help=text.replace("%", "%%"), **takes)
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(argv)).items()}
    config = kind(**{**recipe_of(kind(**given)), **given})
    check_values(config)
    return config


def run(main: Callable[[], None]) -> None:
    """Call a script's main; a UserError becomes one sentence on standard error and exit status 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C does
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")           # for a terminal that cannot show every sign
    try:
        main()
        leave_processes()
        return
    except (UserError, OSError) as mistake:     # OSError: a folder that may not be written to
        sentence = str(mistake).split("UserError: ")[-1].strip()     # a loading process wraps it in its traceback
        said, status = f"error: {harmless(sentence)}", 2
    except (RuntimeError, MemoryError) as error:
        sentence = lack_of_memory(error)
        if not sentence:
            raise
        said, status = f"error: {sentence}", 2
    except KeyboardInterrupt:
        said, status = "Stopped; the same command goes on after what was saved last.", 130
    print(said, file=sys.stderr)
    sys.exit(status)


def leave_processes() -> None:
    """Leave torchrun's group: its threads must end before the interpreter does."""
    if "LOCAL_RANK" in os.environ:
        import torch.distributed as dist  # here, since processes that draw or load images do without it
        if dist.is_initialized():
            dist.destroy_process_group()


def lack_of_memory(error: Exception) -> str:
    """A sentence for an error that comes from a lack of memory; empty for others."""
    told = str(error).strip() or type(error).__name__
    if "in DataLoader worker process" in told:              # a loading process's traceback, as text
        told = told.splitlines()[-1]
    if isinstance(error, BrokenExecutor) or told.startswith("DataLoader worker"):
        return (f"a helping process was killed ({harmless(told.splitlines()[0])}), perhaps for lack of memory; "
                "free some, or give fewer --workers.")
    if any(sign in f"{type(error).__name__} {told}" for sign in ("MemoryError", "allocate memory")):
        told = ". ".join(told.split(". ")[:2])
        return (f"out of memory ({harmless(told)}); free some, or do less at once: a smaller --batch, or --recompute "
                "of adapt.py.")
    return ""
