"""sae_ray: sparse autoencoders trained on Ray with interpretability feedback from judge language models."""

__version__ = "0.1.0"
