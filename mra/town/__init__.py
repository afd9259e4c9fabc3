"""The demo town: sets of drawn pedestrians, in the real sets' own folder layouts and formats.

Read people.py (who is drawn), figure.py (a person as strokes), drawing.py (one image) and sets.py (whole sets).
"""
