"""Running: command line and errors, device and processes, checkpoints, the one training loop, what is kept on disk.

Read command.py, machine.py, checkpoint.py, loop.py, contrastive.py; stages.py (train.py's); networks.py, parts.py.
"""
