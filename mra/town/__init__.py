"""The demo town: drawn pedestrians in the real sets' formats. Read people.py, figure.py, drawing.py, sets.py."""
