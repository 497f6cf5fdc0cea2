"""How alike the maps of layers are, over all inputs: linear CKA and RSA.

Similarity.update(fm)     similarity.py -> pairs.Gram    a batch as its Gram matrix
the pass has ended        pairs.Pairs                    sums for each pair of layers
Similarity.plot()         analysis/drawn.py
"""

from fmapkit.analysis.similarity.similarity import Similarity

__all__ = ["Similarity"]
