"""What is trained, in torch: encoders (one file each), heads, presets."""
