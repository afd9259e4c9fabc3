"""Weights from elsewhere: BERT, vision transformers, the released MRA models, Stable Diffusion.

Read files.py (strict reading), then retrievers.py with released.py, or stable.py. README.md says what was compared.
"""
