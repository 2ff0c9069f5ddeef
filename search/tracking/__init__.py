"""Logging to MLflow: runs, pages, registered models."""
