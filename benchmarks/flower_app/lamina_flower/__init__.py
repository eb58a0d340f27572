"""The baseline's Flower app. Read `work.py`, then `client.py` and `server.py`."""
