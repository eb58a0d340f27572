"""The program on the laptop: cohort, offer, collect, combine, checkpoint, advance. No torch."""
