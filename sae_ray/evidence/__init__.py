"""What is known of each latent before anyone is asked: where it fires, how strongly, and what lies close by.

`collect` gathers it in one pass over a corpus in bounded memory; `examples` deals it out to explainers and scorers,
who never see the same text.
"""
