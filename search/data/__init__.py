"""The dense model, the images, and what the dense model says of them."""
