"""Who is who: keys, certificates and signatures. Start at `lamina/identity/federation.py`."""
