"""Annotation files of the benchmarks, SDA, MALS and a user's own folder. Read read.py, then check.py."""
