"""Examples of everything that another package can add to the verifier; docs/extending.md explains them."""
