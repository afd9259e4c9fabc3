"""Weights from elsewhere: BERT, vision transformers, the released MRA models, Stable Diffusion.

Read files.py (strict reading), then pretrained.py, released.py, or clip.py with stable.py; retrievers.py loads any
retriever. README.md beside this file says what was compared with what.
"""
