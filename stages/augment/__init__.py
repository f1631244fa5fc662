"""Feature-space augmenters: what gives the decoder more features than the store holds."""
