"""What is written down of a proof, so that a program that shares nothing with the verifier can check it.

The format is in docs/proof-format.md. Whoever closes something tells a :class:`~verifier.proof.writer.Proof` or one of
its parts; nothing here decides or proves anything.
"""
