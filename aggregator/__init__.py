"""The program on the laptop: cohort, offer, collect, combine, checkpoint, advance. No torch.

Nothing is imported here. Start at `aggregator/run.py`, the whole story on one screen.
"""
