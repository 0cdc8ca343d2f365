"""Types shared by every other part of the verifier; imports nothing from the rest of the package."""
