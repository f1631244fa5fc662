"""Data sets, one a file: where their images and masks are, and what the classes are called."""
