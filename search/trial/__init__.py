"""A trial: fine-tuning on one worker or several, and what may end it early."""
