"""DaD, domain-aware diffusion (MRA section 2): images of the source's people that look like the target's.

Read noising.py, autoencoder.py, denoiser.py, sampling.py (the model and its use), stable.py (Stable Diffusion as that
model), fit.py (its training), prompts.py, filters.py, boxes.py, transfers.py, making.py (what makes a data set of
samples) and gap.py (what it is compared with, and how).
"""
