"""What the documents claim, as programs that print it."""
