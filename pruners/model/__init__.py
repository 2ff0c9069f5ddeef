"""The network: a timm Vision Transformer that can lose units, tokens and weights, and its files."""
