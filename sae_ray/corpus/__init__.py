"""Text to token blocks: where documents come from, how they are split, packed and numbered."""

from sae_ray.corpus.documents import Corpus, open_corpus
from sae_ray.corpus.reader import SPLITS, BlockReader, Split, TokenBlock, check_corpus, split_of

__all__ = [
    "SPLITS",
    "BlockReader",
    "Corpus",
    "Split",
    "TokenBlock",
    "check_corpus",
    "open_corpus",
    "split_of",
]
