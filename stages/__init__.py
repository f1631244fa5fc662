"""The pipeline's stages and what they are made of."""
