"""The data sets: drawing, reading, augmenting, and making batches of them. Start with people.py."""

Box = tuple[float, float, float, float]    # (cx, cy, w, h), fractions of the image
