"""Weights from elsewhere. Read README.md, files.py with names.ini, released.py, clip.py, retrievers.py, stable.py."""
