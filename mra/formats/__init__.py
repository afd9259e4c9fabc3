"""Annotation files of CUHK-PEDES, ICFG-PEDES, RSTPReid, SDA and MALS, and of a user's own folder.

Read layouts.py (where they lie), read.py (how they become records), check.py (is a set complete?).
"""
