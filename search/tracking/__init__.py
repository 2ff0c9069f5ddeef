"""What MLflow is told: runs, pages, registered models."""
