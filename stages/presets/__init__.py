"""Parameter files for `init`."""
