"""What a pruning method is, and what the methods of a family share."""
