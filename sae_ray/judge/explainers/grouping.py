"""Groups of texts that share words: spherical k-means on TF-IDF, and as many groups as chance cannot explain. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Below this a group's explanation would rest on a text or two.
LEAST_MEMBERS = 4
_ITERATIONS = 30
_SHUFFLES = 19
# Standard deviations, besides: with few shuffles the largest of them is a lottery.
_LEAST_EXCESS = 3.0
_WORD = re.compile(r"[^\W\d_]{2,}")


def groups(texts: Sequence[str], most: int, seed: int = 0) -> list[list[int]]:
    """Indices of the texts of each group, the largest group first; one group of all where nothing separates.

    k groups are sought in the space of the k leading singular vectors of the texts' TF-IDF (latent semantic analysis).
    Their mean silhouette is compared with those of 19 shuffles, in which every word keeps its number of texts but not
    which ones: k-means finds groups in anything. Of 2..most groups, that number is taken whose silhouette exceeds the
    shuffled ones by the most standard deviations, if it does so by more than any shuffle exceeds the others.
    """
    everything = [list(range(len(texts)))]
    counts_NV = word_counts(texts)
    most = min(most, len(texts) // LEAST_MEMBERS, counts_NV.shape[1])
    if most < 2:
        return everything
    numbers = range(2, most + 1)
    rng = np.random.default_rng(seed)
    found = group_by_words(counts_NV, numbers)
    actual_K = np.array([quality for _, quality in found])
    shuffles = (rng.permuted(counts_NV, axis=0) for _ in range(_SHUFFLES))
    shuffled_SK = np.array([[quality for _, quality in group_by_words(each, numbers)] for each in shuffles])
    mean_K, spread_K = shuffled_SK.mean(0), np.maximum(shuffled_SK.std(0, ddof=1), 1e-9)
    excess_K = (actual_K - mean_K) / spread_K
    for index, (labels_N, _) in enumerate(found):
        if np.bincount(labels_N, minlength=index + 2).min() < LEAST_MEMBERS:
            excess_K[index] = -np.inf
    best = int(excess_K.argmax())
    if excess_K[best] <= max(_LEAST_EXCESS, ((shuffled_SK - mean_K) / spread_K).max()):
        return everything
    labels_N = found[best][0]
    members = [np.flatnonzero(labels_N == label).tolist() for label in np.unique(labels_N)]
    return sorted(members, key=lambda each: (-len(each), each[0]))


def group_by_words(counts_NV: Array, numbers: Sequence[int]) -> list[tuple[npt.NDArray[np.int64], float]]:
    """For each number of groups: labels [N], and their mean silhouette."""
    tf_idf_NV = _tf_idf(counts_NV)
    # Left singular vectors times singular values, from the small side: V is some times N.
    value_N, vector_NN = np.linalg.eigh(tf_idf_NV @ tf_idf_NV.T)
    leading_NN = (vector_NN * np.sqrt(np.maximum(value_N, 0)))[:, ::-1]
    found = []
    for k in numbers:
        x_Nk = _unit(leading_NN[:, :k])
        labels_N = k_means(x_Nk, k)
        found.append((labels_N, silhouette(x_Nk, labels_N)))
    return found


def word_counts(texts: Sequence[str]) -> Array:
    """[N, V] of the words that stand in at least two of the texts; others join nothing."""
    bags = [Counter(_WORD.findall(text.lower())) for text in texts]
    texts_with = Counter(word for bag in bags for word in bag)
    words = sorted(word for word, n in texts_with.items() if n >= 2)
    return np.array([[bag[word] for word in words] for bag in bags], dtype=np.float64).reshape(len(texts), len(words))


def k_means(x_ND: Array, k: int) -> npt.NDArray[np.int64]:
    """Labels [N] of unit (or zero) rows by cosine. Deterministic: starts from places far apart where rows are dense.

    Farthest rows alone would be outliers, of which a corpus has many; each place is a row with its nearest ones.
    """
    cosine_NN = x_ND @ x_ND.T
    nearest_Nm = np.argsort(-cosine_NN, axis=1, kind="stable")[:, :LEAST_MEMBERS]
    place_ND = _unit(x_ND[nearest_Nm].sum(1))
    density_N = np.take_along_axis(cosine_NN, nearest_Nm, axis=1)[:, 1:].mean(1)
    dense = np.flatnonzero(density_N >= np.median(density_N))
    starts = [int(density_N.argmax())]
    while len(starts) < k:
        likeness = (place_ND[dense] @ place_ND[starts].T).max(1)
        starts.append(int(dense[likeness.argmin()]))
    centres_kD = place_ND[starts]
    labels_N = np.full(len(x_ND), -1)
    for _ in range(_ITERATIONS):
        nearest_N = (x_ND @ centres_kD.T).argmax(1)
        if (nearest_N == labels_N).all():
            break
        labels_N = nearest_N
        centres_kD = _unit(np.stack([x_ND[labels_N == label].sum(0) for label in range(k)]))
    return labels_N


def silhouette(x_ND: Array, labels_N: npt.NDArray[np.int64]) -> float:
    """Mean over rows of (b - a) / max(a, b): a is the mean cosine distance to its own group, b to the next one.

    0 for a single group, and for rows that are alone in theirs.
    """
    if (labels_N == labels_N[0]).all():
        return 0.0
    distance_NN = 1 - x_ND @ x_ND.T
    np.fill_diagonal(distance_NN, 0)
    member_Nk = (labels_N[:, None] == np.unique(labels_N)).astype(np.float64)
    size_k = member_Nk.sum(0)
    total_Nk = distance_NN @ member_Nk
    own_N = (total_Nk * member_Nk).sum(1) / np.maximum((size_k * member_Nk).sum(1) - 1, 1)
    other_N = np.where(member_Nk > 0, np.inf, total_Nk / size_k).min(1)
    score_N = (other_N - own_N) / np.maximum(np.maximum(own_N, other_N), 1e-12)
    alone_N = (size_k * member_Nk).sum(1) == 1
    return float(np.where(alone_N, 0.0, score_N).mean())


def _tf_idf(counts_NV: Array) -> Array:
    """Unit rows; a word that all texts hold weighs nothing."""
    texts_with_V = (counts_NV > 0).sum(0)
    return _unit(np.log1p(counts_NV) * np.log(len(counts_NV) / np.maximum(texts_with_V, 1)))


def _unit(x_ND: Array) -> Array:
    norm_N = np.linalg.norm(x_ND, axis=1, keepdims=True)
    return np.divide(x_ND, norm_N, out=np.zeros_like(x_ND), where=norm_N > 0)
