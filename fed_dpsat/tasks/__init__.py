"""What a model is trained for: the loss of an example and the metrics of a split. One task a file, found by name."""
