"""What `hasten run` is made of."""
