"""Types that every other part of the verifier shares; imports nothing from the rest of the package."""
