"""A small checker of proofs that a neural network has a property. It shares no code with what wrote the proof.

`python -m proofcheck --onnx NET --vnnlib PROPERTY PROOF` reads the network and the property by itself and accepts the
proof or says where it is wrong. Read the modules in this order: `failures`, `maps` (linear maps), `network` and `nodes`
(ONNX), `vnnlib`, `arithmetic` (float64 with error bounds; exact integers), `relaxation` (lines around nonlinear
functions), `bounds` (intervals and backward passes), `archive` (the file), `check` (the steps of a proof), `cli`.
"""
