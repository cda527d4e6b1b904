"What the test files share: one thread, fixed seeds, small digits `DataLoaders`, tiny networks and two trained ones."
import random
from types import SimpleNamespace

import numpy as np, pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.vision.all import CrossEntropyLossFlat, Learner, Normalize, ProgressCallback
from sklearn.datasets import load_digits

from rkd_fastai.data import arrays_dls

torch.set_num_threads(1)

@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    "The same random numbers in every test, whatever ran before; here and not in a fixture, after which pytest-randomly seeds once more"
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
    return (yield)

@pytest.fixture(scope='session')
def digits():
    "scikit-learn's digits in pixel space: `x` `(1797, 1, 8, 8)` in [0, 1] and `y`, shuffled, as tensors and as uint8 arrays"
    o = load_digits()
    order = np.random.default_rng(0).permutation(len(o.target))
    imgs, y = (o.images*255/16).round().astype(np.uint8)[order], o.target[order]
    return SimpleNamespace(x=torch.tensor(imgs).float()[:,None]/255, y=torch.tensor(y), imgs=imgs, labels=y)

@pytest.fixture(scope='session')
def make_dls(digits):
    "Factory of `DataLoaders` on a part of the digits"
    def make(n=96, n_valid=48, n_test=0, bs=32, channels=1, stats=None, shuffle=True, n_classes=None, **kwargs):
        imgs, y = digits.imgs, digits.labels
        if channels == 3: imgs = np.stack([imgs, 255-imgs, imgs.transpose(0,2,1)], -1) # three channels that differ
        if n_classes: imgs, y = imgs[y<n_classes], y[y<n_classes]
        part = lambda a, b: (imgs[a:b], y[a:b])
        dls = arrays_dls(part(0, n), part(n, n+n_valid), part(n+n_valid, n+n_valid+n_test) if n_test else None,
                         vocab=list(range(n_classes or 10)), bs=bs, **kwargs)
        if stats is not None: dls.add_tfms([Normalize.from_stats(*stats, cuda=False)], 'after_batch')
        if not shuffle: dls.train.shuffle, dls.train.drop_last = False, False
        return dls
    return make

@pytest.fixture(scope='session')
def tiny_net():
    "Factory of small networks `(bs, n_in, 8, 8)` → `(bs, n_out)`, the same weights for the same `seed`"
    def make(n_in=1, n_out=10, bn=True, seed=0, dropout=0.):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(nn.Conv2d(n_in, 8, 3, 2, 1), nn.BatchNorm2d(8) if bn else nn.Identity(), nn.ReLU(),
                                 nn.Dropout(dropout), nn.Flatten(), nn.Linear(8*16, n_out))
    return make

@pytest.fixture
def make_learner(make_dls, tiny_net, tmp_path):
    "Factory of silent Learners in a temporary folder"
    def make(dls=None, model=None, **kwargs):
        kwargs = dict(loss_func=CrossEntropyLossFlat(), path=tmp_path) | kwargs
        dls = make_dls() if dls is None else dls
        learn = Learner(dls, tiny_net(n_in=3 if dls.one_batch()[0].shape[1] == 3 else 1) if model is None else model, **kwargs)
        learn.remove_cb(ProgressCallback)
        learn.logger = lambda *_: None
        return learn
    return make

def _train(digits, attack_steps):
    "A small convolutional network trained by a plain loop, on PGD examples where `attack_steps`, in eval mode"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32),
                              nn.ReLU(), nn.Flatten(), nn.Linear(32*16, 10))
        opt = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(10):
            for i in torch.randperm(1297).split(100):
                x, y = digits.x[i], digits.y[i]
                x_adv = x
                for _ in range(attack_steps):
                    x_adv = x_adv.detach().requires_grad_()
                    g, = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
                    x_adv = (x + (x_adv + .04*g.sign() - x).clamp(-.1, .1)).clamp(0, 1).detach()
                opt.zero_grad(); F.cross_entropy(model(x_adv), y).backward(); opt.step()
    model.zero_grad()
    return model.eval()

@pytest.fixture(scope='session')
def plain_net(digits):
    "A network trained on clean digits; the last 500 are its test images"
    return _train(digits, 0)
@pytest.fixture(scope='session')
def robust_net(digits):
    "The same, trained on PGD-3 examples of radius 0.1"
    return _train(digits, 3)
@pytest.fixture(scope='session')
def test_images(digits): return digits.x[1297:], digits.y[1297:]

@pytest.fixture(scope='session')
def snapshot():
    "All that an attack must leave alone in a model, to compare before and after"
    def snap(model):
        return (({k: v.clone() for k,v in model.state_dict().items()}, [m.training for m in model.modules()],
                 [p.requires_grad for p in model.parameters()], [None if p.grad is None else p.grad.clone() for p in model.parameters()]))
    def same(a, b):
        return (all(torch.equal(v, b[0][k]) for k,v in a[0].items()) and a[1] == b[1] and a[2] == b[2]
                and all((p is None) == (q is None) and (p is None or torch.equal(p, q)) for p,q in zip(a[3], b[3])))
    return SimpleNamespace(take=snap, same=same)
