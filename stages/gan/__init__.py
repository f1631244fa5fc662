"""Generators in training: networks, losses, one step, trainers, and the monitor with its measures."""
