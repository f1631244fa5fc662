"""What both training stages share, and the trained networks that they leave."""

from stages.training.models import load_decoder, load_generator

__all__ = ["load_decoder", "load_generator"]
