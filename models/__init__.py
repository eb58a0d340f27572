"""What is trained, in torch: encoders (one file each), heads, presets.

Nothing is imported here. Start at `models/registry.py` (names), then `models/model.py` (what a model is).
"""
