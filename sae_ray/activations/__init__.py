"""Activation blocks: the language model up to the hook point, its producers, and the stream of leases."""
