"""AutoAttack and the number that comes of it: against `pyautoattack`, on a faster model, on ensembles, when memory
or disk run out, and when killed."""
import copy, errno, json, logging, os, random, re, resource, subprocess, sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest, torch, torch.nn as nn

from rkd_fastai.attacks import autoattack as attacks, pgd
from rkd_fastai.evaluation import robustness as evaluation
from rkd_fastai.all import *
from rkd_fastai.evaluation.robustness import measure_robustness, robust_flags
from rkd_fastai.progress import Progress

logging.getLogger('auto-attack').setLevel(logging.ERROR)

class Saturated(nn.Module):
    "`net` with logits `k` times as large"
    def __init__(self, net, k): super().__init__(); self.net,self.k = net,k
    def forward(self, x): return self.net(x)*self.k

@torch.no_grad()
def right(net, x, y): return net(x).argmax(1) == y

def right_ones(net, images, n):
    x, y = images
    idx = right(net, x, y).nonzero()[:n,0]
    return x[idx], y[idx]

@contextmanager
def shorter(steps=5, queries=40):
    "Within it every part of AutoAttack is short, ours and the package's"
    from pyautoattack import AutoAttack as Published
    real = Published.__init__
    def init(self, *args, **kwargs):
        real(self, *args, **kwargs)
        for o in (self.apgd, self.fab, self.apgd_targeted): o.n_iter = steps
        self.square.n_queries = queries
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Published, '__init__', init)
        m.setattr(AutoAttack.__init__, '__defaults__', tuple(queries if v == 5000 else v
                                                             for v in AutoAttack.__init__.__defaults__))
        yield

@pytest.fixture
def short():
    with shorter(): yield


# --- the package's verdict ---

def published_flags(net, x, y, eps, norm='Linf', seed=0, bs=250, version='standard'):
    from pyautoattack import AutoAttack as Published
    with torch.random.fork_rng():
        x_adv, _ = Published(net, norm=norm, eps=eps, seed=seed,
                             version=version).run_standard_evaluation(x, y, batch_size=bs)
    return right(net, x, y) & right(net, x_adv, y)

@pytest.mark.few(1)
@pytest.mark.parametrize('norm,eps,seed,n,bs', [('Linf', .15, 3, 110, 24), ('L2', .6, 1, 14, 5)])
def test_the_flags_of_the_package(norm, eps, seed, n, bs, robust_net, test_images):
    "Where several batches of survivors are packed again before each part, and by `measure_robustness`"
    x, y = (o[:n] for o in test_images)
    y[3] = (y[3]+1) % 10 # one that is wrong as it is
    with shorter(20, 150):
        want = published_flags(robust_net, x, y, eps, norm, seed, bs)
        x_adv = AutoAttack(eps, norm, seed=seed, bs=bs)(robust_net, x, y)
        r = measure_robustness(robust_net, x, y, 'autoattack', eps, norm, seed, bs=bs)
    assert (torch.equal(right(robust_net, x_adv, y) & right(robust_net, x, y), want)
            and torch.equal(r.flags['autoattack'], want))
    assert 0 < want.sum() < right(robust_net, x, y).sum() and not want[3]
    if norm == 'Linf': assert want.sum() > 2*bs
    assert r.autoattack == want.sum().item()/n and list(r.flags) == ['autoattack']

@pytest.mark.slow
@pytest.mark.parametrize('net_name,eps', [('robust_net', .15), ('plain_net', .1)])
def test_the_flags_of_the_package_in_full(net_name, eps, request, test_images):
    net, (x, y) = request.getfixturevalue(net_name), (o[:110] for o in test_images)
    want = published_flags(net, x, y, eps, bs=24)
    assert (torch.equal(measure_robustness(net, x, y, 'autoattack', eps, bs=24).flags['autoattack'], want)
            and 48 < want.sum() < 110)

@pytest.mark.parametrize('version', ['plus', 'rand'])
def test_other_versions(version, robust_net, test_images):
    x, y = right_ones(robust_net, test_images, 12)
    with shorter(4, 30):
        want = published_flags(robust_net, x, y, .2, bs=5, version=version)
        assert torch.equal(right(robust_net, AutoAttack(.2, version=version, bs=5)(robust_net, x, y), y), want)
    assert 0 < want.sum() < 12


# --- what it is made of ---

def used(version, norm='Linf'):
    "The numbers that the package uses for each part of `version`, as our words would say them"
    from pyautoattack import AutoAttack as Published
    described = []
    def note(name, o):
        targets = getattr(o, 'n_target_classes', 0) if name.endswith('-t') else 0
        how = f'{targets} targets' if targets else f'{o.n_restarts} restart(s)'
        eot = f', each gradient a mean of {o.eot_iter}' if getattr(o, 'eot_iter', 1) > 1 else ''
        described.append(f'square: {o.n_queries} queries' if name == 'square'
                         else f'{name}: {o.n_iter} steps, {how}{eot}')
    aa = Published(lambda x: x.flatten(1)[:,:10], norm=norm, eps=.1, seed=0, version=version)
    x = torch.rand(3, 1, 8, 8)
    y = x.flatten(1)[:,:10].argmax(1)
    for o,name in ((aa.apgd, lambda o: f'apgd-{o.loss}'), (aa.apgd_targeted, lambda o: 'apgd-t'),
                   (aa.fab, lambda o: 'fab-t' if o.targeted else 'fab'), (aa.square, lambda o: 'square')):
        o.perturb = lambda x, y, o=o, name=name: (note(name(o), o), x)[1]
    with torch.random.fork_rng(): aa.run_standard_evaluation(x, y)
    return described

@pytest.mark.parametrize('norm', ['Linf', 'L2'])
@pytest.mark.parametrize('version', ['standard', 'plus', 'rand'])
def test_composition_is_what_the_package_runs(version, norm, robust_net):
    assert AutoAttack(norm=norm, version=version).composition(robust_net, 10) == used(version, norm)

def test_composition_in_words(robust_net):
    assert AutoAttack().composition(robust_net, 10) == [
        'apgd-ce: 100 steps, 1 restart(s)', 'apgd-t: 100 steps, 9 targets', 'fab-t: 100 steps, 9 targets',
        'square: 5000 queries']
    assert AutoAttack(queries=70, fast=True).composition(robust_net, 10) == [
        'apgd-ce: 100 steps, 1 restart(s), fast search', 'apgd-t: 100 steps, 9 targets, fast search',
        'fab-t: 100 steps, 9 targets, fast search', 'square: 70 queries, fast search',
        'apgd-ce: 100 steps, 1 restart(s)']

names = lambda parts: [p.name for p in parts]

@pytest.mark.parametrize('n_out,version,want,without', [
    (2, 'standard', 'apgd-ce fab-t square', 'apgd-t'), (3, 'standard', 'apgd-ce apgd-dlr fab-t square', 'apgd-t'),
    (4, 'standard', 'apgd-ce apgd-t fab-t square', ''),
    (2, 'plus', 'apgd-ce fab square fab-t', 'apgd-dlr apgd-t'),
    (3, 'plus', 'apgd-ce apgd-dlr fab square fab-t', 'apgd-t'),
    (4, 'plus', 'apgd-ce apgd-dlr fab square apgd-t fab-t', ''), (2, 'rand', 'apgd-ce', 'apgd-dlr'),
    (3, 'rand', 'apgd-ce apgd-dlr', ''), (10, 'rand', 'apgd-ce apgd-dlr', '')])
def test_few_classes(n_out, version, want, without, tiny_net):
    net = tiny_net(n_out=n_out).eval()
    aa = AutoAttack(.3, version=version)
    parts, described = aa.parts(net, n_out), aa.composition(net, n_out)
    assert ' '.join(names(parts)) == want
    assert [s.split(':')[0] for s in described if not s.startswith('without')] == want.split()
    assert [s for s in described if s.startswith('without')] == [
        f'without {p}: its loss needs {dict([("apgd-dlr", 3), ("apgd-t", 4)])[p]} classes' for p in without.split()]
    for p in parts:
        if p.name.endswith('-t'): assert f'{min(9, n_out-1)} targets' in repr(p)

@pytest.mark.parametrize('n_out', [2, 3, 4])
@pytest.mark.parametrize('fast', [False, True])
def test_few_classes_run(n_out, fast, tiny_net, short):
    net, x = tiny_net(n_out=n_out).eval(), torch.rand(8, 1, 8, 8)
    y = net(x).argmax(1)
    for version in ('standard', 'plus'):
        x_adv = AutoAttack(.2, version=version, fast=fast, bs=3)(net, x, y)
        assert 0 <= right(net, x_adv, y).sum() < 8 and (x_adv - x).abs().max() <= .2 + 1e-6

@pytest.mark.parametrize('name', ['apgd-ce', 'apgd-dlr', 'apgd-t', 'fab', 'fab-t', 'square'])
def test_single_parts(name, tiny_net, robust_net, test_images, short):
    least = {'apgd-dlr': 3, 'apgd-t': 4}.get(name, 2)
    part, = AutoAttack(version=name).parts(tiny_net(n_out=least), least)
    assert part.name == name and len(AutoAttack(version=name).composition(tiny_net(n_out=least), least)) == 1
    if least > 2:
        with pytest.raises(ValueError, match=f'{name}.* needs at least {least} classes'):
            AutoAttack(version=name).parts(tiny_net(n_out=2), 2)
    # nothing that would not be that part
    assert names(AutoAttack(version=name, fast=True).parts(robust_net, 10)) == [name]
    with pytest.raises(ValueError, match='two classes'): AutoAttack(version=name).parts(robust_net, 1)
    x, y = right_ones(robust_net, test_images, 20)
    for fast in (False, True):
        flags = measure_robustness(
            robust_net, x, y, {'square': 'square', 'apgd-ce': 'apgd'}.get(name, 'autoattack'), .2, fast=fast).flags
        assert sum(f.sum() for f in flags.values()) < 20


def test_numbers_of_the_search(robust_net):
    "Our own search is given the numbers of the package"
    for version,restarts in (('standard', 1), ('plus', 5)):
        for p in AutoAttack(.1, version=version, seed=8, queries=7, fast=True).parts(robust_net, 10)[:-1]:
            o = p.published(robust_net, 'cpu')
            got = getattr(p.search(o), 'keywords', {})
            want = {'apgd-ce': dict(loss='ce', restarts=restarts, steps=100, seed=8),
                    'apgd-dlr': dict(loss='dlr', restarts=restarts, steps=100, seed=8),
                    'apgd-t': dict(targets=9, steps=100, seed=8), 'fab': {}, 'fab-t': dict(targets=9, steps=100),
                    'square': dict(queries=7, seed=8)}
            assert got == want[p.name] and o.n_restarts == (restarts if p.name in ('apgd-ce', 'apgd-dlr', 'fab') else 1)


# --- on a faster model ---

@pytest.mark.parametrize('net_name,eps,n', [('robust_net', .15, 60), ('plain_net', .1, 60),
    *(pytest.param(w, e, 300, marks=pytest.mark.slow) for w,e in (('robust_net', .15), ('plain_net', .1)))])
def test_fast_is_plain(net_name, eps, n, request, test_images):
    """The same verdict on 999 of 1,000 images, but for a few that it finds and the package does not; none is called
    broken that stands on the plain model, and who stands met APGD on it"""
    net, (x, y) = request.getfixturevalue(net_name), right_ones(request.getfixturevalue(net_name), test_images, n)
    n = len(x)
    # on many images only the whole search is sure of those that are close
    with shorter(20, 100) if n <= 60 else nullcontext():
        fast = AutoAttack(eps, fast=True, bs=100)(net, x, y)
        flags = right(net, AutoAttack(eps, bs=100)(net, x, y), y)
        once_more = right(net, AutoAttack(eps, version='apgd-ce', bs=100)(net, x, y), y)
    is_robust = right(net, fast, y)
    assert (is_robust & ~flags).sum() <= n/1000 and 0 < flags.sum() < n
    # it may find a few more: what it finds fools the plain model, too
    assert (flags & ~is_robust).sum() <= max(1, n/100)
    assert (fast - x).abs().max() <= eps + 1e-6 and 0 <= fast.min() and fast.max() <= 1
    assert torch.equal(fast[is_robust], x[is_robust])
    assert not (is_robust & ~once_more).any()

@contextmanager
def wearing(model, forward):
    "`model` with another `forward`"
    model.forward = forward
    try: yield model
    finally: vars(model).pop('forward', None)

def wrong_model(monkeypatch, forward):
    """What AutoAttack takes for a faster form of its model computes `forward(net, x)`; returns how often it was
    asked for"""
    asked = []
    def fake(model, x):
        asked.append(len(x))
        return wearing(model, lambda z: forward(lambda z: type(model).forward(model, z), z))
    monkeypatch.setattr(pgd, 'folded', fake)
    return asked

@pytest.mark.parametrize('forward', [
    lambda net, x: -net(x), lambda net, x: net(x.flip(3)), lambda net, x: net(x) + torch.randn(10)*9,
    lambda net, x: net(x)*float('nan')], ids=['other signs', 'other image', 'other bias', 'NaN'])
def test_errors_of_the_fast_model_alone_are_searched_again(forward, robust_net, test_images, monkeypatch, short):
    "The verdict is that of the plain model, however wrong the faster one is"
    x, y = right_ones(robust_net, test_images, 30)
    want = right(robust_net, AutoAttack(.1, bs=12)(robust_net, x, y), y)
    asked = wrong_model(monkeypatch, forward)
    fast = AutoAttack(.1, fast=True, bs=12)(robust_net, x, y)
    is_robust = right(robust_net, fast, y)
    assert asked and 0 < want.sum() < 30
    assert (is_robust & ~want).sum() <= 3 and torch.equal(fast[is_robust], x[is_robust])
    assert torch.equal(
        measure_robustness(robust_net, x, y, 'autoattack', .1, bs=12, fast=True).flags['autoattack'], is_robust)

def test_all_that_falls_on_the_fast_model_is_searched_for_again(robust_net, test_images, monkeypatch, short):
    """Where the faster model is wrong about everything, every part is done on the plain one, if with other random
    numbers"""
    x, y = right_ones(robust_net, test_images, 30)
    want = right(robust_net, AutoAttack(.12, bs=12)(robust_net, x, y), y)
    wrong_model(monkeypatch, lambda net, x: -net(x))
    got = right(robust_net, AutoAttack(.12, bs=12, fast=True)(robust_net, x, y), y)
    assert (got != want).sum() <= 2 and 0 < want.sum() < 30

def test_images_robust_on_the_fast_model_are_attacked_on_the_plain_one(robust_net, test_images, monkeypatch):
    x, y = test_images
    x, y = right_ones(robust_net, (x[y == 3], y[y == 3]), 20)
    want = right(robust_net, AutoAttack(.15, version='apgd-ce')(robust_net, x, y), y)
    three = torch.eye(10)[3]*9
    asked = wrong_model(monkeypatch, lambda net, x: three + x.flatten(1)[:,:10]*.01) # nothing falls there
    with shorter(100, 30): got = AutoAttack(.15, fast=True)(robust_net, x, y)
    assert len(asked) >= 4 and torch.equal(right(robust_net, got, y), want) and 0 < want.sum() < len(x)

def test_plain_autoattack_folds_nothing(robust_net, test_images, monkeypatch, short):
    x, y = (o[:6] for o in test_images)
    monkeypatch.setattr(pgd, 'folded', lambda *_: 1/0)
    monkeypatch.setattr(attacks, 'faster', lambda **_: 1/0)
    AutoAttack(.1)(robust_net, x, y)
    with pytest.raises(ZeroDivisionError): AutoAttack(.1, fast=True)(robust_net, x, y)

@pytest.mark.parametrize('bs', [1, 3, 24, 250])
def test_in_few_sizes(bs):
    "At most four sizes, the same logits, and gradients for the images that were asked about"
    net, sizes = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), []
    ask = attacks._in_few_sizes(lambda x: (sizes.append(len(x)), net(x))[1], bs)
    for n in {1, 2, bs//8 + 1, bs//4, bs//2 + 1, bs - 1, bs} - {0}:
        if n > bs: continue
        x = torch.rand(n, 1, 8, 8, requires_grad=True)
        out = ask(x)
        assert n <= sizes[-1] <= max(2*n + 1, bs//8), 'the next size, not a larger one'
        torch.testing.assert_close(out, net(x), rtol=0, atol=1e-6)
        got, want = (torch.autograd.grad((o*torch.arange(5.)).sum(), x)[0] for o in (out, net(x)))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert len(set(sizes)) <= 4 and max(sizes) <= bs
    assert len(ask(torch.rand(bs+3, 1, 8, 8))) == bs+3 # more than were announced


# --- ensembles ---

def test_who_gets_a_transfer_part(robust_net, plain_net):
    two, single = Teacher([robust_net, plain_net]), Teacher(robust_net)
    last = lambda model, **kw: AutoAttack(**kw).parts(model, 10)[-1]
    for model in (two, PixelModel(two), PixelModel(two, .1, .9), Teacher(two), Teacher([two, robust_net]),
                  PixelModel(Teacher(Teacher(two)))):
        assert isinstance(last(model), attacks._Transfer) and len(attacks._members(model)) == 2
        assert (AutoAttack().composition(model, 10)[-1].startswith('transfer: PGD(')
                and 'each of 2 members' in AutoAttack().composition(model, 10)[-1])
        fast = AutoAttack(fast=True).parts(model, 10)
        assert isinstance(fast[-2], attacks._Transfer) and repr(fast[-1]) == 'apgd-ce: 100 steps, 1 restart(s)'
        assert names(AutoAttack(version='apgd-ce').parts(model, 10)) == ['apgd-ce']
    for model in (robust_net, single, PixelModel(single), Teacher(single), lambda x: x):
        assert (not attacks._members(model)
                and names(AutoAttack().parts(model, 10)) == ['apgd-ce', 'apgd-t', 'fab-t', 'square'])

def test_members_take_what_the_ensemble_takes(robust_net, plain_net):
    x = torch.rand(3, 1, 8, 8)
    for net,member in zip((robust_net, plain_net), attacks._members(
        PixelModel(Teacher([robust_net, plain_net]), .2, .5))):
        torch.testing.assert_close(member(x), net((x - .2)/.5))

@pytest.mark.slow
def test_an_ensemble_that_only_the_transfer_part_breaks(robust_net, plain_net, test_images, snapshot):
    "With members so sure that log-probabilities saturate, images stand before everything that AutoAttack is made of"
    x, y = right_ones(robust_net, test_images, 40)
    model = Teacher([Saturated(robust_net, 100), Saturated(plain_net, 100)])
    before, rng = snapshot.take(model), torch.get_rng_state()
    with shorter(20, 100):
        aa = AutoAttack(.1, bs=17)
        is_robust = right(model, x, y); n = is_robust.sum().item()
        for part in aa.parts(model, 10)[:-1]:
            is_robust[is_robust.clone()] = robust_flags(model, x[is_robust], y[is_robust], part)
        x_adv = aa(model, x, y)
        r = measure_robustness(model, x, y, 'autoattack', .1, bs=17)
    got = right(model, x_adv, y)
    assert got.sum() < is_robust.sum() < n and not (got & ~is_robust).any(), 'the transfer part breaks more'
    assert torch.equal(r.flags['autoattack'], got) and 'transfer' in r.attacks['autoattack'][-1]
    assert ((x_adv - x).abs().max() <= .1 + 1e-6 and 0 <= x_adv.min() and x_adv.max() <= 1
            and torch.equal(x_adv[got], x[got]))
    assert snapshot.same(before, snapshot.take(model)) and torch.equal(rng, torch.get_rng_state())

def test_other_gpus_keep_their_random_numbers(robust_net, plain_net, monkeypatch, short):
    """The package seeds all of them, whatever the images' device: all are put back. What is ours seeds none but the
    images' own"""
    forked, seeds, fork = [], [], torch.random.fork_rng
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', seeds.append)
    monkeypatch.setattr(torch.random, 'fork_rng', lambda devices: (forked.append(list(devices)), fork(devices=[]))[1])
    *parts, transfer = AutoAttack(.1).parts(Teacher([robust_net, plain_net]), 10)
    x, y = torch.rand(2, 1, 8, 8), torch.arange(2)
    for part in parts: part(robust_net, x, y)
    assert [0, 1, 2] in forked and seeds
    forked.clear(); seeds.clear()
    transfer(Teacher([robust_net, plain_net]), x, y)
    assert [0, 1, 2] not in forked and not seeds


# --- memory ---

class Small(nn.Module):
    "A network on a device that holds so many images"
    def __init__(self, net, most, error): super().__init__(); self.net,self.most,self.error = net,most,error
    def forward(self, x):
        if len(x) > self.most: raise self.error
        return self.net(x)

too_much = [torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'),
            RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'),
            RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'),
            RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
            MemoryError()]

@contextmanager
def batches():
    "The batches that are begun: how many images, and whether it was done"
    real, sizes = evaluation.robust_flags, []
    def flags(model, x, y, attack):
        sizes.append([len(x), False])
        out = real(model, x, y, attack)
        sizes[-1][1] = True
        return out
    with pytest.MonkeyPatch.context() as m:
        m.setattr(evaluation, 'robust_flags', flags)
        yield sizes

@pytest.mark.parametrize('error', too_much, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('most', [39, 5, 1])
def test_out_of_memory(error, most, robust_net, test_images):
    "Half as many at a time until they fit, and every image is attacked"
    x, y = (o[:40] for o in test_images)
    want = measure_robustness(robust_net, x, y, ('clean', 'fgsm'), .1)
    with pytest.warns(UserWarning, match='out of memory') as messages, batches() as sizes:
        got = measure_robustness(Small(robust_net, most, error), x, y, ('clean', 'fgsm'), .1, bs=40)
    assert all(torch.equal(got.flags[k], want.flags[k]) for k in want.flags) and 0 < want.fgsm < want.clean
    halved = {39: [20], 5: [20, 10, 5], 1: [20, 10, 5, 2, 1]}[most]
    n = sum(map(int, want.flags['clean']))
    texts = [str(w.message) for w in messages]
    assert texts[:len(halved)] == [f'out of memory with batches of {a} images: continuing with {b}'
                                   for a,b in zip([40, *halved], halved)]
    assert (sum(s for s,ok in sizes if ok) == 40 + n and max(s for s,ok in sizes if ok) <= most
            and len(texts) == sum(not ok for _,ok in sizes))

@pytest.mark.parametrize('error', too_much, ids=lambda e: type(e).__name__)
def test_out_of_memory_with_a_single_image(error, robust_net, test_images, tmp_path):
    x, y = (o[:6] for o in test_images)
    net = Small(robust_net, 100, error)
    state = tmp_path/'s.json'
    with pytest.MonkeyPatch.context() as m, pytest.raises(type(error)) as e:
        real = evaluation.robust_flags
        def never(*args):
            net.most = 0
            return real(*args)
        m.setattr(evaluation, 'robust_flags', never)
        with pytest.warns(UserWarning, match='continuing with') as messages:
            measure_robustness(net, x, y, 'fgsm', .1, state_path=state)
    assert e.value is error and [str(w.message)[-1] for w in messages] == ['3', '1']
    net.most = 100
    assert measure_robustness(net, x, y, 'fgsm', .1, state_path=state).n == 6

def test_other_errors_are_not_swallowed(robust_net, test_images):
    x, y = (o[:6] for o in test_images)
    for error in (RuntimeError('mat1 and mat2 shapes cannot be multiplied'), ValueError('no'),
                  RuntimeError('CUDA error: an illegal memory access was encountered')):
        with pytest.raises(type(error)) as e: measure_robustness(Small(robust_net, 3, error), x, y, 'fgsm', .1)
        assert e.value is error


# --- killed, and gone on ---

def watched(run, die_at=None):
    "What `run()` returns, and how many batches it took, until it is killed in one"
    class Killed(BaseException): pass
    real, n = evaluation.robust_flags, []
    def flags(*args):
        if len(n)+1 == die_at: raise Killed
        n.append(torch.initial_seed())
        return real(*args)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(evaluation, 'robust_flags', flags)
        try: return run(), n
        except Killed: return None, n

@pytest.mark.few(1)
@pytest.mark.parametrize('fast', [False, True])
def test_resume_in_any_batch(fast, robust_net, test_images, tmp_path):
    "Killed in any batch of any part, a run ends with the same flags, and no batch is done twice"
    x, y = (o[:25] for o in test_images)
    def run(name):
        return lambda: measure_robustness(robust_net, x, y, ('autoattack', 'fgsm'), .12, seed=4, bs=10,
                                          state_path=tmp_path/name, fast=fast)
    with shorter(3, 15):
        want, seeds = watched(run('whole'))
        assert len(seeds) >= 11 and len(set(seeds)) > 3 and 0 < want.autoattack < .9
        for at in range(1, len(seeds)+1):
            _, before = watched(run(f'{at}'), at)
            got, after = watched(run(f'{at}'))
            assert before + after == seeds and len(before) == at-1
            assert (all(torch.equal(got.flags[k], want.flags[k]) for k in want.flags)
                    and list(got.flags) == ['autoattack', 'fgsm'])

@pytest.mark.filterwarnings('ignore:out of memory')
def test_resume_with_a_halved_batch(robust_net, test_images, tmp_path):
    x, y = (o[:25] for o in test_images)
    net = Small(robust_net, 8, too_much[0])
    def run(name):
        return lambda: measure_robustness(net, x, y, 'autoattack', .12, seed=4, bs=20, state_path=tmp_path/name)
    with shorter(3, 15):
        want, seeds = watched(run('whole'))
        for at in range(2, len(seeds)+1, 4):
            _, before = watched(run(f'{at}'), at)
            state = json.loads((tmp_path/f'{at}').read_text())['attacks']
            got, after = watched(run(f'{at}'))
            assert before + after == seeds and torch.equal(got.flags['autoattack'], want.flags['autoattack'])
            if len(before) > 4: assert state['clean']['bs'] <= 8, 'the size that fits is kept'
    assert 0 < want.autoattack < 1

@pytest.mark.few(3)
@pytest.mark.parametrize('at', range(2, 9))
@pytest.mark.parametrize('how', ['ENOSPC', 'limit'])
def test_full_disk(how, at, robust_net, test_images, tmp_path):
    "One error that names the file; what it held before is whole, and goes on when there is room"
    x, y = (o[:25] for o in test_images)
    path, saves = tmp_path/'state.json', []
    run = lambda path: measure_robustness(
        robust_net, x, y, ('clean', 'autoattack'), .12, seed=4, bs=10, state_path=path)
    real = evaluation.write_atomic
    def full(path, text):
        saves.append(text)
        if len(saves) < at: return real(path, text)
        with pytest.MonkeyPatch.context() as m:
            if how == 'ENOSPC':
                def simulate_disk_full(_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                m.setattr(os, 'fsync', simulate_disk_full)
                return real(path, text)
            limits = resource.getrlimit(resource.RLIMIT_FSIZE) # the kernel refuses what would go beyond
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(text)//2, limits[1]))
            try: return real(path, text)
            finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with shorter(3, 15):
        want = run(tmp_path/'whole')
        with pytest.MonkeyPatch.context() as m:
            m.setattr(evaluation, 'write_atomic', full)
            with pytest.raises(OSError, match='state_path') as e: run(path)
        assert len(saves) == at and str(path) in str(e.value) and 'unchanged. Fix this, and run' in str(e.value)
        assert path.read_text() == saves[-2] and json.loads(path.read_text())
        assert sorted(p.name for p in tmp_path.iterdir()) == ['state.json', 'whole'], 'nothing half-written is left'
        got = run(path)
    assert all(torch.equal(got.flags[k], want.flags[k]) for k in want.flags)

@pytest.mark.parametrize('where', ['read-only', 'file', 'proc'])
def test_a_folder_that_cannot_be_written(where, robust_net, test_images, tmp_path):
    "Said before any attack"
    x, y = (o[:5] for o in test_images)
    folder = Path('/proc/no-such-folder') if where == 'proc' else tmp_path/'folder'
    if where == 'file': folder.write_text('')
    if where == 'read-only':
        folder.mkdir(); folder.chmod(0o500)
        if os.access(folder, os.W_OK): pytest.skip('whoever runs this may write anywhere')
    with batches() as sizes, pytest.raises(OSError, match='state_path'):
        measure_robustness(robust_net, x, y, 'fgsm', .1, state_path=folder/'s.json')
    assert not sizes


# --- progress, flags, and what bad input gets ---

@pytest.mark.parametrize('attacks', [('clean', 'pgd3', 'autoattack'), ('autoattack',), ('fgsm', 'cw', 'clean'),
                                     'square'], ids=str)
@pytest.mark.parametrize('through', ['model', 'learner'])
def test_progress(attacks, through, robust_net, test_images, make_learner, make_dls, tmp_path, short):
    reported, note = [], lambda share, text: reported.append((share, text))
    if through == 'learner':
        r = make_learner(make_dls(n=64, n_valid=25), robust_net).robustness(attacks, .15, bs=7, progress=note)
    else:
        r = measure_robustness(robust_net, *(o[:25] for o in test_images), attacks, .15, bs=7, progress=note,
                               state_path=tmp_path/'s.json')
    shares, texts = zip(*reported)
    assert (shares[0] == 0 and shares[-1] == 1 and all(a <= b for a,b in zip(shares, shares[1:]))
            and len(set(shares)) > 4)
    known = [t.rpartition(' left, ')[2] for t in texts]
    order = list(dict.fromkeys(t.split(':')[0] for t in known))
    assert order == list(dict.fromkeys(['clean', *([attacks] if isinstance(attacks, str) else attacks)]))
    for name,flags in r.flags.items():
        mine = [t for t in known if t.startswith(f'{name}:')]
        what = 'right' if name == 'clean' else 'robust'
        assert mine[-1] == f'{name}: {flags.float().mean().item():.1%} {what}'
        assert all(re.fullmatch(rf'{name}: at most [\d.]+% {what} so far', t) for t in mine[:-1])

class Counts(nn.Module):
    "`net`, and the passes of each image through it, a gradient counted as two more"
    def __init__(self, net): super().__init__(); self.net,self.counted = net,[0] # a list, which its twins share
    @property
    def passes(self): return self.counted[0]
    def count(self, n): self.counted[0] += n
    def forward(self, x):
        self.count(len(x))
        out = self.net(x)
        if out.requires_grad: out.register_hook(lambda grad: self.count(2*len(grad)))
        return out

def seconds_left(text):
    "The time left that `text` says, None where it says none"
    found = re.match(r'(?:at most )?([\d:]+) left, ', text)
    return found and sum(60**i*int(s) for i,s in enumerate(reversed(found[1].split(':'))))

@pytest.fixture
def one_pass_a_second(robust_net, monkeypatch):
    "A network that counts, by whose passes the clock of `Progress` goes"
    net = Counts(robust_net).eval()
    monkeypatch.setattr('rkd_fastai.progress.time', SimpleNamespace(time=lambda: net.passes))
    monkeypatch.setattr('rkd_fastai.progress.Progress.memory', 2000)
    return net

@pytest.mark.parametrize('bs,fast', [(48, False), (48, True), (17, True)])
def test_time_left_in_passes(bs, fast, one_pass_a_second, test_images):
    """Until AutoAttack's first part has ended an upper bound, which says so; from then on within a factor of two;
    and it moves within a batch"""
    net, shown, starts = one_pass_a_second, [], []
    class Noted(Progress):
        def expect(self, *args): starts.append(net.passes); super().expect(*args)
    with shorter(15, 150):
        r = measure_robustness(net, *(o[:48] for o in test_images), 'autoattack', .18, bs=bs, fast=fast,
                               progress=Noted(lambda share, text: shown.append((net.passes, share, text))))
    whole, shares = net.passes, [share for _,share,_ in shown]
    assert (12 <= r.flags['autoattack'].sum() <= 20 and shares == sorted(shares) and shares[-1] == 1
            and max(shares[:-1]) < 1)
    first = r.n*(3*15 + 10)*1.1 # no more than that has been asked when the first part ends
    known = [(passes, 'at most' in text.split(' left,')[0], seconds_left(text), whole - passes)
             for passes,_,text in shown if seconds_left(text)]
    bounds, estimates = ([(passes, left, true) for passes,at_most,left,true in known if at_most == yes]
                         for yes in (True, False))
    assert max(passes for passes,*_ in bounds) <= min(passes for passes,*_ in estimates) < first
    assert all(left >= true for _,left,true in bounds)
    assert all(true/2 <= left <= 2*true for _,left,true in estimates if true > whole/50)
    for a,b in zip(starts, starts[1:]): # every tenth of a batch, and more
        if b - a > 200: assert len({left for passes,_,left,_ in known if a <= passes < b}) >= 10

@pytest.mark.parametrize('fast', [False, True])
def test_counting_changes_nothing(fast, robust_net, test_images, short, monkeypatch):
    """Not the flags, also where random numbers are drawn in between, and no module is asked otherwise: what is
    folded stays so"""
    x, y = (o[:25] for o in test_images)
    norms, forward = [0], nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, 'forward', lambda self, x: (norms.append(norms.pop() + 1), forward(self, x))[1])
    def found(progress):
        norms[:] = [0]
        return measure_robustness(robust_net, x, y, ('pgd3', 'autoattack'), .2, fast=fast,
                                  progress=progress).flags, *norms
    found(False)
    monkeypatch.setattr(Progress, 'every', 0)
    (want, n_plain), (got, n_counted) = found(False), found(lambda *_: torch.rand(3))
    assert (all(torch.equal(want[k], got[k]) for k in want) and 0 < want['autoattack'].sum() < 25
            and n_plain == n_counted)
    assert not any(m._forward_hooks or 'forward' in vars(m) for m in robust_net.modules())

def test_progress_of_what_is_gone_on_with(robust_net, test_images, tmp_path, short):
    x, y = (o[:25] for o in test_images)
    reported = []
    run = lambda: measure_robustness(robust_net, x, y, ('autoattack', 'pgd3'), .12, bs=8, state_path=tmp_path/'s.json',
                                     progress=lambda share, text: reported.append(share))
    watched(run, 7); reported.clear(); run()
    assert reported[0] >= 0 and reported[-1] == 1 and reported == sorted(reported)

def test_flags(robust_net, test_images):
    x, y = (o[:30] for o in test_images)
    r = measure_robustness(robust_net, x, y, ('fgsm', 'clean'), .1, bs=7)
    assert (list(r.flags) == ['fgsm', 'clean']
            and all(f.dtype == torch.bool and f.shape == (30,) and f.device.type == 'cpu' for f in r.flags.values()))
    assert torch.equal(r.flags['clean'], right(robust_net, x, y)) and not (r.flags['fgsm'] & ~r.flags['clean']).any()
    assert torch.equal(r.flags['fgsm'], torch.cat([robust_flags(robust_net, a, b, FGSM(.1))
                                                   for a,b in zip(x.split(1), y.split(1))]))
    assert r.results == {k: f.sum().item()/30 for k,f in r.flags.items()}

def test_bad_input(robust_net, test_images, tmp_path):
    "Said before an attack is begun and a file is written"
    x, y = (o[:8].clone() for o in test_images)
    above, below, nan = x.clone(), x.clone(), x.clone()
    above[7,0,0,0], below[7,0,0,0], nan[7,0,0,0] = 1.01, -.01, float('nan')
    for bad,kwargs,word in (((x, y), dict(attacks=()), '`attacks` is empty'),
                            ((x[:0], y[:0]), {}, '`x` contains no images'),
                            ((x, y[:5]), {}, '`targ` has 5 labels for 8'),
                            ((above, y), {}, r'\[0, 1\]'), ((below, y), {}, r'\[0, 1\]'), ((nan, y), {}, 'NaN'),
                            ((x, y), dict(bs=0), '`bs`'), ((x, y), dict(eps=8), '`eps`')):
        with batches() as sizes, pytest.raises(ValueError, match=word):
            measure_robustness(robust_net, *bad, **dict(attacks='fgsm', state_path=tmp_path/'s.json') | kwargs)
        assert not sizes and not list(tmp_path.iterdir())

@pytest.mark.parametrize('label', [10, -1, 255])
def test_labels_out_of_range(label, robust_net, test_images):
    "Also where only the last of several batches holds one, and before any attack"
    x, y = (o[:8].clone() for o in test_images)
    y[7] = label
    with batches() as sizes, pytest.raises(ValueError, match='`targ` contains classes'):
        measure_robustness(robust_net, x, y, 'autoattack', .1, bs=3)
    assert [ok for _,ok in sizes] == [True, True, False]

@pytest.mark.parametrize('what', [float('nan'), float('inf')])
def test_logits_that_are_none_for_some_images(what, robust_net, test_images):
    x, y = (o[:8].clone() for o in test_images)
    class Some(nn.Module):
        def forward(self, z):
            return torch.where((z == x[7]).flatten(1).all(1)[:,None], torch.tensor(what), robust_net(z))
    with batches() as sizes, pytest.raises(ValueError, match='NaN or infinite'):
        measure_robustness(Some(), x, y, 'fgsm', .1, bs=3)
    assert [ok for _,ok in sizes] == [True, True, False], 'the clean pass finds it'


# --- real kills ---

script = '''
import logging, os, random, signal, sys, time, torch
from rkd_fastai.evaluation.robustness import measure_robustness
torch.set_num_threads(1)
logging.getLogger('auto-attack').setLevel(logging.ERROR)
how, data, path, out = sys.argv[1:5]
net, x, y = torch.load(data, weights_only=False)

def measure(path): return measure_robustness(net, x, y, ('clean', 'autoattack'), .15, seed=2, bs=4, state_path=path)
def state(): return open(path).read() if os.path.exists(path) else ''

if how == 'kills':
    rng, seen = random.Random(int(sys.argv[5])), []
    for _ in range(20):
        pid = os.fork()
        if not pid:
            try: measure(path)
            finally: os._exit(0)
        time.sleep(rng.random()*2.5) # a batch takes a tenth of a second, or two
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        seen.append(state())
    assert len(set(seen)) > 5, 'it gets on between kills'
else: torch.save(measure(path).flags, out)
'''

@pytest.mark.slow
def test_sigkill(robust_net, test_images, tmp_path):
    "20 kills at random moments and three processes: the same flags as one process that nobody killed"
    x, y = right_ones(robust_net, test_images, 60)
    torch.save((robust_net, x, y), tmp_path/'data.pt')
    (tmp_path/'script.py').write_text(script)
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    def start(how, name, *args):
        subprocess.run([sys.executable, str(tmp_path/'script.py'), how, str(tmp_path/'data.pt'),
                        str(tmp_path/f'{name}.json'), str(tmp_path/f'{name}.pt'), *args],
                       env=env, check=True, timeout=280)
    start('kills', 'killed', str(random.randrange(1000)))
    before = json.loads((tmp_path/'killed.json').read_text())
    start('measure', 'killed'); start('measure', 'whole')
    killed, whole = (torch.load(tmp_path/f'{k}.pt') for k in ('killed', 'whole'))
    assert all(torch.equal(killed[k], whole[k]) for k in whole) and 0 < whole['autoattack'].sum() < len(x)
    assert (before['run'] == json.loads((tmp_path/'killed.json').read_text())['run']
            and before['attacks'] != json.loads((tmp_path/'whole.json').read_text())['attacks'])

@pytest.mark.few(1)
@pytest.mark.parametrize('form', ['channels_last', 'transposed', 'soft'])
def test_images_and_labels_in_other_forms(form, robust_net, test_images):
    "Views are no trouble, and soft labels count as their largest class, as in every attack"
    x, y = (o[:6] for o in test_images)
    other = dict(channels_last=(x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last), y),
                 transposed=(x.transpose(2, 3).contiguous().transpose(2, 3), y),
                 soft=(x, torch.nn.functional.one_hot(y, 10).float()))[form]
    net = (lambda o: robust_net(o.mean(1, keepdim=True))) if form == 'channels_last' else robust_net
    plain = (other[0].contiguous(), y)
    for version in ('apgd-ce', 'apgd-t'):
        assert torch.equal(AutoAttack(.15, version=version)(net, *other), AutoAttack(.15, version=version)(net, *plain))

def test_labels_beyond_the_classes(robust_net, test_images):
    x, y = (o[:6] for o in test_images)
    with pytest.raises(ValueError, match='`targ` contains classes.*: give the network an output'):
        AutoAttack(.15)(robust_net, x, y + 70)

# --- what it is given ---

def test_square_in_l2_on_a_faster_model(robust_net, test_images, monkeypatch):
    "The package's own search, which keeps float32 buffers, also where Square's network computes in bfloat16"
    monkeypatch.setattr(attacks, 'has_bf16', lambda device: True)
    x, y = (t[:24] for t in test_images)
    slow, fast = (robust_accuracy(robust_net, x, y, AutoAttack(.5, 'L2', version='square', queries=100, fast=f))
                  for f in (False, True))
    assert abs(slow - fast) <= 1/24 + 1e-6 and slow < 1

@pytest.mark.parametrize('norm', ['Linf', 'L2'])
def test_square_on_a_network_in_bfloat16(norm, robust_net, test_images):
    net, x, y = copy.deepcopy(robust_net).bfloat16(), *(t[:8] for t in test_images)
    x_adv = AutoAttack(.1, norm, version='square', queries=20)(net, x.bfloat16(), y)
    assert x_adv.dtype == torch.bfloat16 and x_adv.shape == x.shape

@pytest.mark.few(2)
@pytest.mark.parametrize('name', ['apgd', 'square', 'autoattack'])
def test_soft_labels(name, tiny_net):
    "Stand for the class they name, as in every other attack"
    net, x = tiny_net(n_out=4).eval(), torch.rand(6, 1, 8, 8)
    hard = net(x).argmax(1)
    one, other = (measure_robustness(net, x, y, [name], eps=.05, fast=True).to_df().accuracy[name]
                  for y in (hard, torch.eye(4)[hard]))
    assert one == other

def test_a_network_with_members_that_is_no_ensemble(tiny_net):
    class Club(nn.Module):
        def __init__(self): super().__init__(); self.net, self.members = tiny_net(), 3
        def forward(self, x): return self.net(x)
    assert AutoAttack().composition(Club(), 10) == AutoAttack().composition(tiny_net(), 10)
    assert 'transfer' in ' '.join(AutoAttack().composition(Teacher([tiny_net(), tiny_net(seed=1)]), 10))

@pytest.fixture
def other_defaults(request):
    "Function: PyTorch's default dtype and device become others, until the test ends"
    dtype = torch.get_default_dtype()
    def set_them(dtype, device):
        torch.set_default_dtype(dtype); torch.set_default_device(device)
    yield set_them
    torch.set_default_dtype(dtype); torch.set_default_device(None)

class OwnTensors(nn.Module):
    "A network that makes a tensor of the default dtype"
    def __init__(self, net): super().__init__(); self.net,self.seen = net,set()
    def forward(self, x): self.seen.add(torch.zeros(1, device='cpu').dtype); return self.net(x)

@pytest.mark.few(1)
@pytest.mark.parametrize('dtype,device', [(torch.float64, None), (torch.float32, 'meta')], ids=['float64', 'device'])
@pytest.mark.parametrize('fast', [False, True], ids=['published', 'fast'])
def test_other_defaults_of_pytorch(dtype, device, fast, robust_net, test_images, other_defaults):
    "The same x′ to the bit; and the network still sees the user's defaults"
    x, y = test_images[0][:20], test_images[1][:20]
    attacks = ([AutoAttack(.1, version=v, queries=20, fast=fast) for v in ('apgd-ce', 'fab-t', 'square', 'apgd-dlr')]
               + [PGD(.1, restarts=2, steps=2)]*fast)
    def run():
        torch.manual_seed(0)
        return [a(net, x, y) for a in attacks]
    net = OwnTensors(robust_net)
    want = run()
    net.seen.clear(); other_defaults(dtype, device)
    assert (all(torch.equal(a, b) for a,b in zip(run(), want)) and net.seen == {dtype}
            and torch.get_default_dtype() == dtype)

def test_square_in_l2_on_low_images(monkeypatch):
    "It starts from squares of a fifth of the height: said before anything has run; narrow images are no matter"
    net = lambda h, w: nn.Sequential(nn.Flatten(), nn.Linear(h*w, 10)).eval()
    x, y = torch.rand(4,1,4,30), torch.zeros(4).long()
    monkeypatch.setattr(attacks._Part, 'perturb', lambda *args: pytest.fail('an attack has run'))
    for make in (lambda v: AutoAttack(.5, 'L2', v), lambda v: AutoAttack(.5, 'L2', v, fast=True)):
        for v in ('square', 'standard', 'plus'):
            with pytest.raises(ValueError, match='Square in L2.*5 pixels high.*4×30'): make(v)(net(4, 30), x, y)
    with pytest.raises(ValueError, match='Square in L2'):
        evaluation.measure_robustness(net(4, 30), x, y, ('pgd2', 'autoattack'), .5, 'L2')
    monkeypatch.undo()
    for norm,h,w in (('Linf',4,30), ('L2',5,1), ('L2',30,4)):
        model, x = net(h, w), torch.rand(4,1,h,w)
        x_adv = AutoAttack(.9, norm, 'square', queries=50)(model, x, model(x).argmax(1))
        assert (x_adv != x).any()
