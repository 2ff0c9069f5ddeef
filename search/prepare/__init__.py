"""What is learned once per sweep, before the trials."""
