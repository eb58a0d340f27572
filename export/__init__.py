"""From a model and a schedule to a bundle, and from trained parameters to the final model.

Nothing is imported here. Start at `export/bundle.py`; `export/final.py` needs no torch.
"""
