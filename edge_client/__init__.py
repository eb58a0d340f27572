"""The program on the device: offer, fetch, features, train, report. No torch, no onnx."""
