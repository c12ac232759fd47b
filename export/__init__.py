"""Out of torch: ONNX graphs, ONNX Runtime sessions, ahead-of-time packages. Imported as ``bigain_fx.export``."""
