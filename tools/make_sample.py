"""Write the sample of Fashion-MNIST that the package ships, the same bytes each time. Usage: python
tools/make_sample.py FOLDER-OF-THE-IDX-FILES"""
import sys
from pathlib import Path
import numpy as np
from rkd_fastai.data.benchmarks import read_fashion


def first(x, y, n=100):
    "The first `n` images of each class, in file order"
    keep = np.sort(np.concatenate([np.flatnonzero(y == c)[:n] for c in range(10)]))
    return x[keep], y[keep]


(x_train, y_train), (x_test, y_test) = [first(*read_fashion(sys.argv[1], o)) for o in ('train', 't10k')]
out = Path(__file__).parent.parent/'rkd_fastai/samples/fashion_sample.npz'
np.savez_compressed(out, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
