"""What every stage may import: configuration, errors, devices and processes, tracking."""
