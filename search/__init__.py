"""The search: sweeps over pruning plans with Ray Tune and Optuna, shown in MLflow."""
