"""APGD, FAB and Square against `pyautoattack`: the same steps from the same random numbers, call by call, and the
same images that fall."""
import copy, logging, math

import pytest, torch, torch.nn as nn
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack

from rkd_fastai.attacks import apgd as apgd_module, fab as fab_module, search, square as square_module
from rkd_fastai.attacks.apgd import apgd
from rkd_fastai.attacks.fab import fab
from rkd_fastai.attacks.square import square

quiet = logging.getLogger('tests.search')
quiet.addHandler(logging.NullHandler()); quiet.propagate = False

class Recorder:
    "`net`, and every batch that it was asked about"
    def __init__(self, net): self.net,self.seen,self.out = net,[],[]
    def __call__(self, x):
        out = self.net(x)
        self.seen.append(x.detach().clone()); self.out.append(out.detach().clone())
        return out

def package(cls, net, x, y, eps, **kwargs):
    "What the package returns"
    with torch.random.fork_rng():
        return cls(net, norm='Linf', eps=eps, device='cpu', **kwargs).perturb(x.clone(), y).detach()

def package_apgd(net, x, y, eps, loss='ce', targets=0, restarts=1, steps=100, seed=0):
    if targets:
        return package(APGDAttack_targeted, net, x, y, eps,
                       n_target_classes=targets, n_iter=steps, seed=seed, logger=quiet)
    return package(APGDAttack, net, x, y, eps, loss=loss, n_restarts=restarts, n_iter=steps, seed=seed, logger=quiet)
def package_fab(net, x, y, eps, targets=9, steps=100):
    return package(FABAttack_PT, net, x, y, eps, targeted=True, n_target_classes=targets, n_iter=steps)
def package_square(net, x, y, eps, queries=5000, seed=0):
    return package(SquareAttack, net, x, y, eps, n_queries=queries, seed=seed, resc_schedule=False)

@torch.no_grad()
def right(net, x, y): return net(x).argmax(1) == y

@torch.no_grad()
def surest(net, images, n):
    "The `n` images that `net` is surest of"
    x, y = images
    margin = square_module._margin(net, x, y)
    idx = margin.argsort(descending=True)[:n]
    return x[idx], y[idx]

def right_ones(net, images, n):
    x, y = images
    idx = right(net, x, y).nonzero()[:n,0]
    return x[idx], y[idx]

def distance(a, b): return (a - b).flatten(1).abs().amax(1)


# --- the same steps ---

@pytest.mark.parametrize('kwargs', [dict(), dict(loss='ce', restarts=3, seed=7), dict(loss='dlr', restarts=2),
                                    dict(targets=3, seed=2), dict(targets=9, steps=20),
                                    dict(steps=1), dict(steps=7), dict(steps=50, loss='dlr')], ids=str)
def test_apgd_takes_the_steps_of_the_package(kwargs, robust_net, test_images):
    "On images that stand, the model is asked about the same images in the same order; the package predicts `x` first"
    x, y = surest(robust_net, test_images, 16)
    mine, their = Recorder(robust_net), Recorder(robust_net)
    got, want = apgd(mine, x, y, .05, **kwargs), package_apgd(their, x, y, .05, **kwargs)
    assert torch.equal(got, x) and torch.equal(want, x), 'all stand'
    runs, each = (kwargs['targets'], 1) if 'targets' in kwargs else (kwargs.get('restarts', 1), 0)
    assert len(mine.seen) == len(their.seen) - 1 == runs*(kwargs.get('steps', 100) + 1 + each)
    for i,(a,b) in enumerate(zip(mine.seen, their.seen[1:])):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=lambda m: f'call {i}: {m}')
    assert (distance(mine.seen[-1], x).max() > .04
            and len({round(s.double().sum().item(), 6) for s in mine.seen}) > kwargs.get('steps', 100)//2)

class Course:
    """A model whose margins over the wrong class are `margins`, call by call, wherever it is asked; its gradient
    points to `middle`, but for the first column"""
    def __init__(self, margins, middle): self.margins,self.middle = iter(margins),middle
    def __call__(self, x):
        off = (x - self.middle)[...,1:].square().flatten(1).sum(1)
        return torch.stack([next(self.margins) + off - off.detach(), torch.zeros(len(x))], 1)

@pytest.mark.parametrize('seed', range(3))
def test_apgd_looks_back_as_the_package_does(seed):
    """Losses that rise, fall, stay, and fall at once to rise ever after: where to halve the step and go back is a
    matter of them alone"""
    torch.manual_seed(seed)
    n,steps = 12,100
    x, y, middle = torch.rand(n, 1, 2, 2)*.5 + .25, torch.zeros(n).long(), torch.rand(n, 1, 2, 2)
    margins = 2 + (torch.randn(steps+1, n)*torch.linspace(.01, .3, n)).cumsum(0).clamp(-1, 1)
    # never as good as the start, and better with each step
    margins[0,:3],margins[1:,:3] = .5, 3 - .01*torch.arange(steps)[:,None]
    margins[:,3] = 2
    margins[:,4] = 3 - .01*torch.arange(steps+1)
    margins[43:51:2,4] += .015 # 12 rises in the third period, which has 16 steps: exactly three quarters
    mine,their = Recorder(Course(margins, middle)), Recorder(Course(torch.cat([margins[:1], margins]), middle))
    apgd(mine, x, y, .1, steps=steps), package_apgd(their, x, y, .1, steps=steps)
    assert len(mine.seen) == len(their.seen) - 1 == steps + 1
    for i,(a,b) in enumerate(zip(mine.seen, their.seen[1:])):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=lambda m: f'call {i}: {m}')

def in_float64(m):
    "Within the monkeypatch context `m` the package computes in float64, where it would in float32"
    m.setattr(torch.Tensor, 'float', torch.Tensor.double)

@pytest.fixture
def double(monkeypatch, robust_net, plain_net): # which are trained before, in float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    in_float64(monkeypatch)
    yield
    torch.set_default_dtype(before)

@pytest.mark.parametrize('net_name', ['robust_net', 'plain_net'])
def test_fab_takes_the_steps_of_the_package(net_name, request, test_images, double):
    "Towards each target, the same first steps; then rounding drives two runs apart"
    net = copy.deepcopy(request.getfixturevalue(net_name)).double()
    x, y = surest(net, tuple(o.double() if o.is_floating_point() else o for o in test_images), 16)
    mine, their, steps, targets = Recorder(net), Recorder(net), 6, 4
    got, want = (fab(mine, x, y, .02, targets=targets, steps=steps),
                 package_fab(their, x, y, .02, targets=targets, steps=steps))
    assert torch.equal(got, x) and torch.equal(want, x)
    assert len(mine.seen) == targets*(1 + 2*steps) and len(their.seen) == 1 + targets*(3 + 2*steps)
    for t in range(targets):
        a, b = mine.seen[t*(1+2*steps):][1:1+8], their.seen[1+t*(3+2*steps):][2:2+8]
        for i,(p,q) in enumerate(zip(a, b)):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-4, msg=lambda m: f'target {t}, call {i}: {m}')
        assert torch.equal(a[0], x) and distance(a[1], x).max() > .1
    ends = [mine.seen[t*(1+2*steps)+8] for t in range(targets)]
    assert all(distance(p, q).max() > .05 for p,q in zip(ends, ends[1:])), 'one target is not another'

def test_fab_in_float32(robust_net, test_images):
    x, y = surest(robust_net, test_images, 16)
    mine, their = Recorder(robust_net), Recorder(robust_net)
    fab(mine, x, y, .02, targets=1, steps=2), package_fab(their, x, y, .02, targets=1, steps=2)
    assert len(mine.seen) == 5 and len(their.seen) == 8
    for a,b in zip(mine.seen[1:], their.seen[3:7]): torch.testing.assert_close(a, b, rtol=0, atol=1e-4)

def replay(calls, logits, y):
    """What the package asked about after its first call, without images that are what they were, and how many such
    there were"""
    u = torch.arange(len(y))
    def margin(out):
        wrong = out.clone(); wrong[u,y] = -torch.inf
        return out[u,y] - wrong.amax(1)
    best, lowest, asked, same = calls[0], margin(logits[0]), [calls[0]], 0
    for new,out in zip(calls[1:], logits[1:]):
        changed = (new != best).flatten(1).any(1)
        same += (~changed).sum().item()
        if changed.any(): asked.append(new[changed])
        m = margin(out)
        better = m < lowest
        best, lowest = torch.where(better.view(-1,1,1,1), new, best), torch.where(better, m, lowest)
    return asked, same

@pytest.mark.parametrize('net_name,seed,plateaus', [
    ('robust_net', 0, False), ('plain_net', 3, False), ('robust_net', 1, True)])
def test_square_takes_the_steps_of_the_package(net_name, seed, plateaus, request, test_images):
    """On images that stand, all that is left out are questions about images that did not change; what is no better
    is not taken, on `plateaus` of a rounded margin either"""
    net64 = copy.deepcopy(request.getfixturevalue(net_name)).double()
    # a comparison of two margins must not hang on the size of a batch
    net = lambda x: net64(x.double()).round() if plateaus else net64(x.double())
    x, y = surest(net, test_images, 8)
    mine, their, queries = Recorder(net), Recorder(net), 700
    got, want = (square(mine, x, y, .05, queries=queries, seed=seed),
                 package_square(their, x, y, .05, queries=queries, seed=seed))
    assert torch.equal(got, x) and torch.equal(want, x), 'all stand'
    assert len(their.seen) == 1 + (1 + queries) + 1
    asked, same = replay(their.seen[1:-1], their.out[1:-1], y)
    assert len(mine.seen) == len(asked) and same > 100
    for a,b in zip(mine.seen, asked): torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert sum(map(len, mine.seen)) == len(x)*(1 + queries) - same

def test_square_counts_a_tie_as_fallen():
    x, y = torch.full((2, 1, 4, 4), .5), torch.ones(2).long()
    # but at `x`, where class 1 wins
    tie = lambda o: torch.stack([torch.zeros(len(o)), (o == .5).flatten(1).all(1).float()], 1)
    got, want = square(tie, x, y, .1, queries=3), package_square(tie, x, y, .1, queries=3)
    assert torch.equal(got, want) and (got != x).all()

@pytest.mark.parametrize('eps', [.15, .25])
def test_square_finds_the_images_of_the_package(eps, robust_net, test_images):
    net64 = copy.deepcopy(robust_net).double()
    net = lambda x: net64(x.double())
    x, y = right_ones(net, test_images, 60)
    got, want = square(net, x, y, eps, queries=400, seed=5), package_square(net, x, y, eps, queries=400, seed=5)
    assert 3 < (~right(net, got, y)).sum() < 60
    torch.testing.assert_close(got, want, rtol=0, atol=0)

@pytest.mark.parametrize('shape', [(3,8,8), (3,5,9), (2,13,4)], ids=str)
def test_square_on_colours_and_oblongs(shape):
    net = flat(shape[0], seed=4).double()
    f, x = (lambda x: net(x.double())), torch.rand(20, *shape)
    y = f(x).argmax(1)
    got, want = square(f, x, y, .1, queries=150, seed=1), package_square(f, x, y, .1, queries=150, seed=1)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert 0 < right(f, got, y).sum() < 20

def test_sides_of_the_squares():
    "Those of the package at every query, for square, wide and tiny images"
    their = SquareAttack(None, p_init=.8, resc_schedule=False)
    for h,w in ((8,8), (32,32), (5,12), (1,3), (224,224)):
        want = [min(max(int(round(math.sqrt(their.p_selection(q)*h*w))), 1), h, w) for q in range(10_000)]
        assert [square_module._side(q, h, w) for q in range(10_000)] == want


# --- the same images fall ---

searches = dict(
    ce=(apgd, package_apgd, dict(loss='ce', steps=40)),
    restarts=(apgd, package_apgd, dict(loss='ce', steps=20, restarts=3, seed=4)),
    dlr=(apgd, package_apgd, dict(loss='dlr', steps=40)),
    targets=(apgd, package_apgd, dict(targets=9, steps=15, seed=1)),
    fab=(fab, package_fab, dict(targets=9, steps=15)),
    square=(square, package_square, dict(queries=300, seed=2)))
every_search = pytest.mark.parametrize('name', searches)

@pytest.mark.few(8)
@every_search
@pytest.mark.parametrize('net_name,eps', [
    ('robust_net', .1), ('robust_net', .2), ('plain_net', .06), ('plain_net', .15)])
def test_the_same_images_fall(name, net_name, eps, request, test_images):
    net = request.getfixturevalue(net_name)
    x, y = right_ones(net, test_images, 80)
    mine, their, kwargs = searches[name]
    got = mine(net, x, y, eps, **kwargs)
    is_robust = right(net, got, y)
    assert torch.equal(is_robust, right(net, their(net, x, y, eps, **kwargs), y))
    assert 0 < is_robust.sum() < 80
    assert distance(got, x).max() <= eps + 1e-6 and 0 <= got.min() and got.max() <= 1
    assert torch.equal(got[is_robust], x[is_robust]), 'where nothing is found, the image itself'


# --- the losses ---

@pytest.mark.parametrize('n_out', [3, 4, 10])
def test_dlr(n_out):
    "Eq. 6 and 7 of Croce and Hein as they are written, in float64, whether the label is the likeliest class or not"
    z, y = torch.randn(50, n_out).double()*3, torch.arange(50) % n_out
    z[:10].scatter_(1, y[:10,None], 9.) # right ones
    z[10:12] = (torch.arange(n_out) != y[10:12,None]).double() # all others alike: the unit is 1e-12
    got = apgd_module._dlr(z, y, None)
    for row,c,v in zip(z.tolist(), y.tolist(), got.tolist()):
        pi = sorted(row, reverse=True)
        assert v == pytest.approx(-(row[c] - max(o for k,o in enumerate(row) if k != c))/(pi[0] - pi[2] + 1e-12),
                                  abs=1e-9)
    if n_out < 4: return
    for target in range(n_out):
        got = apgd_module._dlr_targeted(z, y, torch.full((50,), target))
        for row,c,v in zip(z.tolist(), y.tolist(), got.tolist()):
            pi = sorted(row, reverse=True)
            assert v == pytest.approx(-(row[c] - row[target])/(pi[0] - .5*(pi[2] + pi[3]) + 1e-12), abs=1e-9)

def test_ce_is_that_of_each_image():
    z, y = torch.randn(20, 5).double(), torch.arange(20) % 5
    want = -z.softmax(1)[torch.arange(20), y].log()
    torch.testing.assert_close(apgd_module._ce(z, y, None), want)

def test_targets_in_turn():
    "Rank 2 is the likeliest wrong class, also where the right one is not the likeliest"
    z, y = torch.randn(30, 6), torch.arange(30) % 6
    z[:15].scatter_(1, y[:15,None], 9.)
    for rank in range(2, 7):
        got = search.ranked_class(lambda x: z, torch.zeros(30, 1, 1, 1), y, rank)
        want = [sorted((c for c in range(6) if c != l), key=lambda c: -row[c])[rank-2]
                for row,l in zip(z.tolist(), y.tolist())]
        assert got.tolist() == want


# --- the projection ---

def bisected(t, w, b):
    "The same in float64, slowly: each component goes as far as it may, up to one distance, which is halved upon"
    out = []
    for t,w,b in zip(t.double(), w.double(), b.double()):
        down = (w*t).sum() >= b
        towards = -w.sign() if down else w.sign()
        room = torch.where(towards < 0, t, 1-t)
        def moved(by): return towards*room.clamp_max(by)
        def arrived(by): return (w*(t + moved(by))).sum() <= b if down else (w*(t + moved(by))).sum() >= b
        lo, hi = 0., 1.
        if not arrived(hi): out.append(moved(1.)); continue
        for _ in range(60):
            mid = (lo + hi)/2
            lo, hi = (lo, mid) if arrived(mid) else (mid, hi)
        out.append(moved(hi))
    return torch.stack(out)

@pytest.mark.parametrize('k', [1, 2, 64, 768])
@pytest.mark.parametrize('kind', ['any', 'zeros', 'border', 'infeasible', 'through'])
def test_onto_plane(k, kind):
    t, w = torch.rand(40, k), torch.randn(40, k)*torch.logspace(-3, 3, 40)[:,None]
    if kind == 'zeros': w[torch.rand(40, k) < .6] = 0; w[0] = 0
    if kind == 'border': t = torch.where(torch.rand(40, k) < .7, t.round(), t)
    at = (w*t).sum(1)
    lowest, highest = w.clamp_max(0).sum(1), w.clamp_min(0).sum(1)
    share = torch.rand(40)
    b = at + share*(torch.where(torch.arange(40) % 2 == 0, highest, lowest) - at)
    if kind == 'infeasible': b = torch.where(torch.arange(40) % 2 == 0, highest + 1, lowest - 1)
    if kind == 'through': b = at
    got, want = fab_module._onto_plane(t, w, b), bisected(t, w, b)
    assert got.shape == (40, k) and got.isfinite().all()
    if kind == 'through': assert got.abs().max() < 1e-5; return
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-5)
    assert (t + got).min() >= -1e-6 and (t + got).max() <= 1 + 1e-6
    if kind == 'any' and k > 1: assert got.abs().max() > .05

def test_onto_plane_needs_few_steps():
    "Also where components reach the border one by one, and the distance is to be found among many"
    t, w = torch.cat([torch.linspace(0, 1, 3072)[None], torch.logspace(-6, 0, 3072)[None]]), torch.ones(2, 3072)
    for share in (.01, .5, .9, .999, .99999):
        b = (w*t).sum(1)*(1-share)
        torch.testing.assert_close(fab_module._onto_plane(t, w, b).double(), bisected(t, w, b), rtol=0,
                                   atol=2e-3 if share > .999 else 1e-4)

def test_onto_plane_of_small_distances():
    "It looks no less closely where the plane is near and the border nearer"
    t, w = torch.logspace(-9, -3, 768)[None], torch.ones(1, 768)
    for share in (.5, .9, .99):
        b = (w*t).sum(1)*(1-share)
        torch.testing.assert_close(fab_module._onto_plane(t, w, b).double(), bisected(t, w, b), rtol=1e-3, atol=1e-9)

def test_fab_takes_what_is_just_within_the_radius():
    "Only at white does this image fall, which is as far away as it may go"
    x, y = torch.full((1, 1, 1, 1), .5), torch.zeros(1).long()
    net = lambda o: torch.stack([torch.full((len(o),), .999), o.flatten(1).sum(1)], 1)
    assert fab(net, x, y, .5, targets=1, steps=5).item() == 1 and fab(net, x, y, .49, targets=1, steps=5).item() == .5


# --- what does not change, and edge cases ---

def flat(n_in=3, n_out=10, seed=0):
    "A network for images of any size"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(n_in, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                             nn.Flatten(), nn.Linear(32, n_out)).eval()

quick = dict(ce=(apgd, dict(steps=8)), dlr=(apgd, dict(loss='dlr', steps=8, restarts=2)),
             targets=(apgd, dict(targets=2, steps=8)), fab=(fab, dict(targets=2, steps=8)),
             square=(square, dict(queries=60)))
every_quick = pytest.mark.parametrize('name', quick)

@every_quick
@pytest.mark.parametrize('shape,n_out', [((5,3,8,8), 10), ((1,3,8,8), 10), ((5,1,6,11), 10), ((4,3,13,5), 10),
                                         ((6,1,8,8), 3), ((6,1,8,8), 2), ((3,2,1,1), 4)], ids=str)
@pytest.mark.parametrize('eps', [0., 1e-4, .1, 1.])
def test_any_images(name, shape, n_out, eps, snapshot):
    f, kwargs = quick[name]
    if n_out < dict(dlr=3, targets=4).get(name, 2): return
    if n_out == 2: kwargs = kwargs | (dict(targets=1) if name == 'fab' else {})
    net, x = flat(shape[1], n_out), torch.rand(shape)
    y = net(x).argmax(1)
    before, x0, y0, rng = snapshot.take(net), x.clone(), y.clone(), torch.get_rng_state()
    x_adv = f(net, x, y, eps, **kwargs)
    assert (torch.equal(rng, torch.get_rng_state()) and snapshot.same(before, snapshot.take(net))
            and torch.equal(x, x0) and torch.equal(y, y0))
    assert (x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
            and x_adv.data_ptr() != x.data_ptr())
    assert 0 <= x_adv.min() and x_adv.max() <= 1 and distance(x_adv, x).max() <= eps + 1e-6
    is_robust = right(net, x_adv, y)
    assert torch.equal(x_adv[is_robust], x[is_robust]) and (distance(x_adv, x)[~is_robust] > 0).all()
    if not eps: assert is_robust.all()

class Always(nn.Module):
    "Takes every image for class `c`, by logits that an attack can climb"
    def __init__(self, c): super().__init__(); self.c = c
    def forward(self, x):
        z = x.flatten(1)[:,:6]*.1
        return z + torch.eye(6)[self.c]*10

@every_quick
def test_none_falls(name):
    f, kwargs = quick[name]
    x, net = torch.rand(5, 1, 8, 8), Recorder(Always(2))
    assert torch.equal(f(net, x, torch.full((5,), 2), .3, **kwargs), x) and len(net.seen) > 1

@every_quick
def test_all_fall_at_once(name):
    "Then nothing more is asked, by no restart, no target and no query"
    f, kwargs = quick[name]
    x, calls = torch.rand(5, 1, 8, 8), []
    def net(z): # right on `x` alone, with a gradient there
        calls.append(len(z))
        moved = ((z - x).flatten(1).sum(1) + 1e-5).abs()
        return torch.stack([1 - 1000*moved, z.flatten(1)[:,0]*.01, z.flatten(1)[:,1]*.02, z.flatten(1)[:,2]*.03], 1)
    x_adv = f(net, x, torch.zeros(5).long(), .3, **kwargs)
    assert (net(x_adv).argmax(1) > 0).all()
    assert len(calls) - 1 <= dict(ce=1, dlr=1, targets=2, fab=5, square=1)[name]

@every_quick
def test_misclassified_images_are_not_searched_again(name, robust_net, test_images):
    f, kwargs = quick[name]
    x, y = right_ones(robust_net, test_images, 60)
    net = Recorder(robust_net)
    x_adv = f(net, x, y, .15, **kwargs)
    n = right(robust_net, x_adv, y).sum().item()
    sizes = list(map(len, net.seen))
    if name != 'square': assert sizes == sorted(sizes, reverse=True) and sizes[-1] <= n + len(x)//4
    assert 0 < n < 60 and sizes[0] == 60 and sum(sizes) < .97*60*len(sizes)

@pytest.mark.parametrize('name', ['ce', 'square'])
def test_seeds(name, robust_net, test_images):
    "The same seed, the same images, whatever the global random numbers; another, others"
    f, kwargs = quick[name]
    x, y = right_ones(robust_net, test_images, 40)
    torch.manual_seed(1); a = f(robust_net, x, y, .2, **kwargs, seed=3)
    torch.manual_seed(2); b = f(robust_net, x, y, .2, **kwargs, seed=3)
    assert torch.equal(a, b) and not torch.equal(a, f(robust_net, x, y, .2, **kwargs, seed=4)) and not torch.equal(a, x)

def test_restarts_differ(robust_net, test_images):
    x, y = surest(robust_net, test_images, 4)
    net = Recorder(robust_net)
    apgd(net, x, y, .02, steps=3, restarts=2)
    assert len(net.seen) == 8 and not torch.equal(net.seen[0], net.seen[4])

@every_quick
def test_what_is_no_logits(name):
    f, kwargs = quick[name]
    with pytest.raises(TypeError, match='logits'):
        f(nn.Identity(), torch.rand(2, 1, 8, 8), torch.arange(2), .1, **kwargs)

def test_arguments_that_fit_no_network():
    net, x, y = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), torch.rand(2, 1, 8, 8), torch.arange(2)
    for f,kw,says in ((apgd, dict(loss='cw'), "`loss` must be 'ce' or 'dlr', got 'cw'"),
                      (apgd, dict(targets=2), 'needs at least 4 classes'), (fab, {}, '`targets` must be at most 2')):
        with pytest.raises(ValueError, match=says): f(net, x, y, .1, **kw)
    net[1] = nn.Linear(64, 2)
    with pytest.raises(ValueError, match='needs at least 3 classes'): apgd(net, x, y, .1, loss='dlr')
