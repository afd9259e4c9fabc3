"""Running. Read command.py, machine.py, checkpoint.py, loop.py, contrastive.py, stages.py, networks.py, parts.py."""
