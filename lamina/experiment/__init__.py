"""`lamina experiment`: a grid of settings and seeds, run, gathered and reported. Start at `command.py`."""
