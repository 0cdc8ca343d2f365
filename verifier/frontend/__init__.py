"""Reading networks: ONNX files and torch modules become graphs, which are checked against the original."""
