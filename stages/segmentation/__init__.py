"""Features under masks: regions, class statistics, transforms, loss, metrics, evaluation."""
