"""Side-by-side measurements: each prints a table and writes it as JSON on request."""
