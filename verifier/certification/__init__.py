"""Many inputs of one network: which are certified, which are falsified, at which radii."""
