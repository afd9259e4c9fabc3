"""The command line of a script, and its errors as one sentence."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields

from mra.config import UserError
from mra.data.files import printable

# in the text of an error if memory ran out, or if the system killed a process to free memory
MEMORY = "MemoryError", "allocate memory", "out of memory", "DataLoader worker (pid", "BrokenProcessPool"


def parse(kind: type, doc: str, argv: list[str] | None = None, recipe_of: Callable = lambda config: {}):
    """A configuration of class `kind`: a given flag overrides `recipe_of`, which overrides the defaults.

    Raises UserError for flags that cannot be read, and for a number outside its range.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)

    def refuse(message: str) -> None:
        raise UserError(f"{message}; --help lists the flags.")

    parser.error = refuse
    usual = kind(**recipe_of(kind()))
    for field in fields(kind):
        text = f"{field.metadata['text']} (default: {getattr(usual, field.name)!r})"
        if field.type is bool:
            takes = dict(action=argparse.BooleanOptionalAction)
        elif field.type == tuple[str, ...]:
            takes = dict(nargs="+", action="extend")
        elif field.metadata["bare"] is not None:
            takes = dict(type=field.type, nargs="?", const=field.metadata["bare"])
        else:
            takes = dict(type=field.type, choices=field.metadata["choices"])
        parser.add_argument("--" + field.name.replace("_", "-"), help=text.replace("%", "%%"), **takes)
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(argv)).items()}
    config = kind(**recipe_of(kind(**given)) | given)
    for field in fields(kind):
        value, least, most = getattr(config, field.name), field.metadata["least"], field.metadata["most"]
        if least is not None and not least <= value <= most:
            name = field.name.replace("_", "-")
            raise UserError(f"--{name} {value}: give a value from {least} to {most:.10g}.")
    return config


def run(main: Callable[[], None]) -> None:
    """Call a script's main. A UserError becomes one sentence on standard error, and exit status 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # SIGTERM acts like Ctrl-C
    for stream in (sys.__stdout__, sys.__stderr__):
        # a terminal may not know every character; a log should have every line at once
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
        if "LOCAL_RANK" in os.environ:      # the threads of torchrun's group must end before the interpreter does
            import torch.distributed  # here: processes that draw or load images do not need it
            torch.distributed.destroy_process_group()
        return
    except KeyboardInterrupt:
        said, status = "Stopped.", 130
        if sys.argv[0].endswith(("train.py", "adapt.py")):
            said += " The same command goes on from what was saved last."
    except (UserError, OSError) as mistake:     # OSError: a folder that is locked or read-only
        sentence = str(mistake).split("UserError: ")[-1].strip()     # a loading process adds its traceback
        said, status = f"error: {printable(sentence)}", 2
    except (RuntimeError, MemoryError) as error:
        text = f"{type(error).__name__}: {error}".strip()
        if not any(sign in text for sign in MEMORY):
            raise
        reason = printable(text.splitlines()[-1])        # the last line of a loading process's traceback
        said = (f"error: out of memory, or a worker process was killed ({reason}); free some, or give a smaller "
                "--batch or fewer --workers.")
        status = 2
    print(said, file=sys.stderr)
    sys.exit(status)
