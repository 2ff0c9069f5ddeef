"""What a sweep is: its file, checked. Imports neither torch nor Ray."""
