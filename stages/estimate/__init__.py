"""What a configuration costs before it runs: sizes and the cost of a step."""
