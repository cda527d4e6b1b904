"What the test files share: one thread, fixed seeds, small digits `DataLoaders`, tiny networks and two trained ones."
import copy, os, random, subprocess, sys, textwrap
from collections import Counter
from types import SimpleNamespace

import numpy as np, pytest, torch, torch.nn as nn, torch.nn.functional as F
from PIL import Image
from fastai.vision.all import Callback, CrossEntropyLossFlat, Learner, Normalize, ProgressCallback
from sklearn.datasets import load_digits

from rkd_fastai.attacks.pgd import PGD
from rkd_fastai.data.arrays import arrays_dls

torch.set_num_threads(1)

def python(code):
    "What `code` prints in a fresh interpreter"
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return r.stdout.strip()

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "Of a test that is marked `few(n)`, `n` cases spread over all of them are quick; the others are slow"
    groups = {}
    for item in items:
        if item.get_closest_marker('few'): groups.setdefault((item.path, item.originalname), []).append(item)
    for cases in groups.values():
        n = cases[0].get_closest_marker('few').args[0]
        kept = {round(i*(len(cases) - 1)/max(n - 1, 1)) for i in range(n)}
        for i,item in enumerate(sorted(cases, key=lambda o: o.nodeid)):
            if i not in kept: item.add_marker(pytest.mark.slow)

@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """The same random numbers in every test, whatever ran before; here and not in a fixture, after which
    pytest-randomly seeds once more"""
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
    trace = sys.gettrace()
    try: return (yield)
    finally:
        # `make coverage` would count nothing more after a test that compiles
        if sys.gettrace() is not trace: sys.settrace(trace)

@pytest.fixture(scope='session')
def digits():
    """scikit-learn's digits in pixel space: `x` `(1797, 1, 8, 8)` in [0, 1] and `y`, shuffled, as tensors and as
    uint8 arrays"""
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
        learn = Learner(
            dls, tiny_net(n_in=3 if dls.one_batch()[0].shape[1] == 3 else 1) if model is None else model, **kwargs)
        learn.remove_cb(ProgressCallback)
        learn.logger = lambda *_: None
        return learn
    return make

def _train(digits, attack_steps):
    "A small convolutional network trained by a plain loop, on PGD examples where `attack_steps`, in eval mode"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1),
                              nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32*16, 10))
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
    _shared.append((model, copy.deepcopy(model.state_dict())))
    return model.eval()

_shared = [] # networks of the whole session, and their weights

@pytest.fixture(scope='session')
def plain_net(digits):
    "A network trained on clean digits; the last 500 are its test images"
    return _train(digits, 0)
@pytest.fixture(scope='session')
def robust_net(digits):
    "The same, trained on PGD-3 examples of radius 0.1"
    return _train(digits, 3)
@pytest.fixture(autouse=True)
def shared_networks_stay():
    "Whatever a test did to a network that all share, the next one finds it as it was trained"
    yield
    for net,state in _shared:
        if any(not torch.equal(v, state[k]) for k,v in net.state_dict().items()): net.load_state_dict(state)
        net.eval()

@pytest.fixture(autouse=True)
def no_figures_of_other_tests():
    "A test may count the open figures, whatever an earlier one has left open"
    if plt := sys.modules.get('matplotlib.pyplot'): plt.close('all')

@pytest.fixture(scope='session')
def test_images(digits): return digits.x[1297:], digits.y[1297:]

@pytest.fixture(scope='session')
def snapshot():
    "All that an attack must leave alone in a model, to compare before and after"
    def snap(model):
        return (({k: v.clone() for k,v in model.state_dict().items()}, [m.training for m in model.modules()],
                 [p.requires_grad for p in model.parameters()],
                 [None if p.grad is None else p.grad.clone() for p in model.parameters()]))
    def same(a, b):
        return (all(torch.equal(v, b[0][k]) for k,v in a[0].items()) and a[1] == b[1] and a[2] == b[2]
                and all((p is None) == (q is None) and (p is None or torch.equal(p, q)) for p,q in zip(a[3], b[3])))
    return SimpleNamespace(take=snap, same=same)

@pytest.fixture
def make_images(tmp_path):
    "Factory of a folder with `n` images of noise in each of two sub-folders, dark and bright"
    def make(n=6, size=32):
        rng = np.random.default_rng(0)
        for cls,low in (('dark',0), ('bright',128)):
            (tmp_path/'images'/cls).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(low, low+128, (size,size,3), dtype=np.uint8)).save(
                    tmp_path/'images'/cls/f'{i}.png')
        return tmp_path/'images'
    return make

@pytest.fixture(scope='session')
def open_files():
    """Function: how often this process has which file open. Compare by `-`, as what an earlier test opened may be
    closed meanwhile"""
    def opened():
        links = (f'/proc/self/fd/{n}' for n in os.listdir('/proc/self/fd'))
        return Counter(f for f in (os.readlink(l) for l in links if os.path.exists(l)) if '/proc/' not in f)
    return opened

# --- distillation, step by step, against plain PyTorch ---

def plain(t): return t.detach().as_subclass(torch.Tensor).clone()

class Before(Callback):
    "What every training batch starts from"
    order, run_valid = 4, False # before the robust callbacks
    def before_fit(self): self.steps = []
    def before_batch(self):
        self.steps.append(SimpleNamespace(model=copy.deepcopy(self.model), x=plain(self.x), y=plain(self.y),
                                          rng=torch.get_rng_state()))
class After(Callback):
    "What the student is shown, and what comes of it"
    order, run_valid = 50, False
    def before_batch(self): self.before.steps[-1].seen = plain(self.x)
    def after_batch(self):
        vars(self.before.steps[-1]).update(after=copy.deepcopy(self.model), rng_after=torch.get_rng_state())

def check_step(s, native, method, norm, denorm, eps, lr, alpha=.8, lam=5/6):
    """Raise unless step `s` is that of plain PyTorch: PGD-2 on the model in eval mode, Eq. 7 (AKD⁺) or Eq. 6
    (RSLAD⁺), SGD"""
    # the format of a fit, which rounds in its own way
    model, x, x_seen = s.model.to(memory_format=torch.channels_last), denorm(s.x), denorm(s.seen)
    start, modes = {k: v.clone() for k,v in model.state_dict().items()}, [m.training for m in model.modules()]
    ce = lambda x: F.cross_entropy(model(norm(x)), s.y, reduction='sum')
    # the attack: pixels, eval mode, no random numbers but those of the uniform start
    torch.set_rng_state(s.rng)
    model.eval()
    x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(2):
        g, = torch.autograd.grad(ce(x_adv.requires_grad_()), x_adv)
        x_adv = (x + (x_adv.detach() + 1.5*eps*g.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    assert ((x_adv - x_seen).abs() < 1e-5).float().mean() > .99 # the sign of a vanishing gradient is anyone's
    with torch.no_grad(): assert ce(x_seen) > ce(x) + 1e-3
    dist = (x_seen - x).abs()
    torch.testing.assert_close(dist.amax((0,2,3)), torch.full((x.shape[1],), eps), rtol=0, atol=1e-5)
    assert (x_seen.min() > -1e-5 and x_seen.max() < 1 + 1e-5
            and ((dist > eps - 1e-5) | (x_seen < 1e-5) | (x_seen > 1 - 1e-5)).float().mean() > .5)
    # the step, on the very x′ that the student saw
    for m,mode in zip(model.modules(), modes): m.training = mode
    logits_adv = model(s.seen.clone())
    target = alpha*native(x_seen if method == 'akd' else x) + (1-alpha)*F.one_hot(s.y, logits_adv.shape[1])
    if method == 'akd': loss = F.cross_entropy(logits_adv, target)
    else:
        kl = lambda logits: (torch.xlogy(target, target) - target*logits.log_softmax(1)).sum(1).mean()
        loss = (1-lam)*kl(model(s.x.clone())) + lam*kl(logits_adv)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    opt.zero_grad(); loss.backward(); opt.step()
    got = s.after.state_dict()
    for k,v in model.state_dict().items():
        torch.testing.assert_close(got[k], v, rtol=1e-4, atol=1e-5, msg=lambda m: f'{k}: {m}')
    assert torch.equal(s.rng_after, torch.get_rng_state())
    assert [p.requires_grad for p in s.after.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [m.training for m in s.after.modules()] == modes
    for k,p in s.after.named_parameters(): assert p.requires_grad or torch.equal(p, start[k])
    assert max((p - start[k]).abs().max() for k,p in s.after.named_parameters()) > 1e-4

@pytest.fixture(scope='session')
def check_distillation():
    """Function: one epoch of `learn`, whose optimiser is plain SGD, raises unless every step is that of plain
    PyTorch and the teacher stays"""
    def check(learn, teacher, # a `Teacher`
              native, # the same as a function, from pixel space to probabilities, without this package
              method='akd', stats=None, # mean and std of the student's normalisation
              eps=8/255, lr=.02):
        m, s = (torch.tensor(o).view(1,-1,1,1) for o in stats or ([0.], [1.]))
        weights = {k: v.clone() for k,v in teacher.state_dict().items()}
        learn.to_rkd(teacher, method, attack=PGD(eps, steps=2, step_size=1.5*eps))
        learn.fit(1, lr, cbs=[before := Before(), After()])
        assert len(before.steps) == len(learn.dls.train)
        for step in before.steps: check_step(step, native, method, lambda x: (x-m)/s, lambda x: x*s+m, eps, lr)
        assert (all(torch.equal(v, weights[k]) for k,v in teacher.state_dict().items())
                and all(p.grad is None for p in teacher.parameters()))
    return check
