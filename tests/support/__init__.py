"""Random networks, their ONNX files, properties and exact truth: what tests of the whole verifier stand on."""
