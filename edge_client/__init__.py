"""The program on the device: offer, fetch, cache features, train, report. No torch.

Nothing is imported here. Start at `edge_client/session.py`, the whole story on one screen.
"""
