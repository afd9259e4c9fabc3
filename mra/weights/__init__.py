"""Weights from elsewhere: BERT, vision transformers, CLIP, the released MRA models, Stable Diffusion.

Read files.py, then released.py and retrievers.py, or clip.py and stable.py. README.md says what was compared.
"""
