"""Sparse autoencoders: architectures, losses, initialisation, sparse products, file formats. No Ray here."""
