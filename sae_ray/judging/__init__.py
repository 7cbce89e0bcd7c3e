"""`sae-ray judge`: explains and scores the latents of any SAE.

target    which SAE, on which model, hook point and corpus
gather    one pass of the producers' blocks through collectors: evidence on disk
desk      an actor that explains and scores latents in batches, and commits each
run       the driver: who waits for whom, progress, budget, resume
results   the committed rows, and what they say together
terminal  `sae-ray explain`: one latent with coloured tokens
"""
