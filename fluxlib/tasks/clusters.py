"""Pseudo-labels for data sets that come without any: clusters of similar prompts.

Paper: non-IID "following the FedNLP benchmark", which clusters sentence embeddings into 5 groups by K-Means and deals
those out by a Dirichlet. Deviation: the embedding is TF-IDF reduced to 50 dimensions (latent semantic analysis), which
needs no further model and gives the same labels on every machine of the same architecture.
"""

from __future__ import annotations

import warnings
from collections import Counter
from functools import lru_cache

NUM_CLUSTERS = 5
DIMENSIONS = 50


@lru_cache(maxsize=2)
def cluster_labels(texts: tuple[str, ...], num_clusters: int = NUM_CLUSTERS) -> tuple[str, ...]:
    """One label per text, ``cluster0`` being the largest; the same texts always get the same labels."""
    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    if len(texts) <= num_clusters:
        return ("cluster0",) * len(texts)
    counts = TfidfVectorizer(sublinear_tf=True, stop_words="english", token_pattern=r"(?u)\b\w+\b").fit_transform(texts)
    size = min(DIMENSIONS, min(counts.shape) - 1)
    points = normalize(TruncatedSVD(size, random_state=0).fit_transform(counts)) if size > 0 else counts.toarray()
    with warnings.catch_warnings():
        # Fewer different prompts than clusters: some stay empty.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(num_clusters, n_init=4, random_state=0).fit_predict(np.asarray(points))
    by_size = {cluster: rank for rank, (cluster, _) in enumerate(Counter(found.tolist()).most_common())}
    return tuple(f"cluster{by_size[cluster]}" for cluster in found.tolist())
