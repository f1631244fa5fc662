"""Generators in training: networks, losses, one step, trainers, monitor and its measures."""
