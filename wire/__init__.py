"""What crosses the broker: both programs speak it, and neither carries the other."""
