"""What the operators compute: one file per family, from the mathematics down to the module."""
