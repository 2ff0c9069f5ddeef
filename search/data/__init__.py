"""The dense model, the images, and the dense model's logits as teacher."""
