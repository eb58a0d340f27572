"""From a folder of examples to arrays: the same reading on every device and on the aggregator."""
