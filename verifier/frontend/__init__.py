"""Networks in: ONNX files and torch modules to graphs, checked against the original."""
