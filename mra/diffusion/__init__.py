"""DaD, domain-aware diffusion (MRA section 2): images that look as if the target's cameras had taken them.

Read noising.py, autoencoder.py, denoiser.py, base.py (the model), pairs.py (what it learns from), sampling.py
(guidance, samples), prompts.py, plan.py (what to make, with a box for each phrase) and filters.py.
"""

from mra.diffusion.noising import ddim as ddim
from mra.diffusion.noising import dpm_solver as dpm_solver
