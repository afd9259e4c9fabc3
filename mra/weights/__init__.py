"""Weights from elsewhere: BERT, vision transformers, CLIP, the released MRA models, Stable Diffusion.

Read files.py and names.ini, released.py, clip.py, retrievers.py and stable.py. README.md says what was compared.
"""
