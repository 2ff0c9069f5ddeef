"""Gradients and curvature of the loss, which scores are made of."""
