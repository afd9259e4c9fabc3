"""python -m tests.street: see cut.py."""

from tests.street.cut import main

main()
