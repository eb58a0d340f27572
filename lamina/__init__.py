"""The front door: the `lamina` command, local runs, data sets, evaluation.

Nothing is imported here. Start at `lamina/cli.py`.
"""
