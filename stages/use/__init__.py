"""What a trained model is used for, one module a command."""
