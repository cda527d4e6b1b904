"""Long runs stay as they began: memory flat, steps as fast, no file left open; whatever stops one, wherever,
the Learner can be fitted again as if it were new."""
import copy, gc, linecache, os, random, sys, threading, time

import numpy as np, pytest, torch, torch.nn as nn
from torch._subclasses import FakeTensor
from fastai.callback.core import event
from fastai.vision.all import (Callback, CancelBackwardException, CancelBatchException, CancelEpochException,
                               CancelFitException, CancelStepException, CancelTrainException, CancelValidException)

from rkd_fastai.all import *
from rkd_fastai.evaluation.robustness import measure_robustness, robust_accuracy

pgd = PGD(.1, steps=2)
methods = dict(
    at=lambda t: [AdversarialTraining(pgd), NonFinite()],
    trades=lambda t: [TRADES(PGD(.1, steps=2, objective='kl')), WeightAveraging(.5)],
    akd=lambda t: [AKDCallback(t, attack=pgd), NonFinite(), WeightAveraging(.5)],
    rslad=lambda t: [RSLADCallback([t, t], attack=PGD(.1, steps=2, objective='kl'), cache=True)],
    ckd=lambda t: [CKDCallback(t, T=2.), NonFinite()])

# --- memory, time, files ---

class Wide(nn.Module):
    "A network whose activations and images a leak could not hide"
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
                                 nn.Linear(1024, 10))
    def forward(self, x): return self.net(x)

def resident():
    "Bytes of this process that are in memory"
    with open('/proc/self/statm') as f: return int(f.read().split()[1])*os.sysconf('SC_PAGE_SIZE')
def alive():
    """Bytes of all tensors that Python knows, one-element ones left out, as fastai's Recorder keeps each loss, and
    the ones without memory that torch.compile keeps"""
    gc.collect()
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects()
             if issubclass(type(t), torch.Tensor) and not issubclass(type(t), FakeTensor)
             and t.layout == torch.strided and t.numel() > 1}
    return sum(found.values())

class Watch(Callback):
    "What each step took, and what is in memory after every `every`-th"
    order, run_valid = 2000, False
    def __init__(self, every): self.every, self.resident, self.alive, self.seconds, self.t = every, [], [], [], None
    def before_batch(self): self.t = time.process_time()
    def after_batch(self):
        self.seconds.append(time.process_time() - self.t)
        if len(self.seconds) % self.every: return
        self.alive.append(alive()); self.resident.append(resident())

needs_proc = pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='needs /proc')

def long_run(make_learner, make_dls, tiny_net, name, steps, every):
    "A run of so many steps of 64 images, watched"
    dls = make_dls(n=640, n_valid=64, bs=64, channels=3, device_resident=True)
    learn = make_learner(dls, Wide(), cbs=methods[name](Wide()), metrics=[RobustAccuracy(PGD(.1, steps=1), n=16)])
    learn.fit(steps//10, 1e-3, cbs=(watch := Watch(every)))
    return watch

@needs_proc
@pytest.mark.parametrize('name', ['at','akd','rslad', *(pytest.param(m, marks=pytest.mark.slow)
                                                        for m in ('trades','ckd'))])
def test_a_hundred_steps(name, make_learner, make_dls, tiny_net):
    "Not one tensor more from step to step; a batch of images, or a graph, kept a step would be 10 MB"
    watch = long_run(make_learner, make_dls, tiny_net, name, 120, 20)
    assert len(set(watch.alive[2:])) == 1, watch.alive
    assert watch.resident[-1] - watch.resident[2] < 4e6, watch.resident

@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize('name', methods)
def test_two_thousand_steps(name, make_learner, make_dls, tiny_net):
    watch = long_run(make_learner, make_dls, tiny_net, name, 2000, 100)
    assert len(set(watch.alive[2:])) == 1, watch.alive
    assert watch.resident[-1] - watch.resident[4] < 8e6, watch.resident
    # of the quick steps: others are slow for what else runs here
    early, late = (np.quantile(watch.seconds[a:b], .1) for a,b in ((200, 600), (1600, 2000)))
    assert late < 1.3*early, (early, late)

@needs_proc
@pytest.mark.parametrize('how', ['attack','teacher','models'])
def test_attacks_and_teachers_keep_nothing(how):
    "Called again and again, and on one model after another"
    net, x, y = Wide().eval(), torch.rand(64, 3, 8, 8), torch.arange(64) % 10
    teacher = Teacher(net)
    def once():
        if how == 'attack': pgd(net, x, y); robust_accuracy(net, x, y, PGD(.1, steps=1), bs=32)
        if how == 'teacher': teacher.probs(x, T=2.)
        if how == 'models': pgd(Wide(), x, y); Teacher(Wide()).probs(x)
    for _ in range(20): once()
    held, was = alive(), resident()
    for _ in range(100): once()
    # less, where something of an earlier test has ended meanwhile; so for files and threads below
    assert alive() <= held and resident() - was < 4e6

@needs_proc
@pytest.mark.parametrize('ends', ['well','badly'])
def test_no_file_stays_open(ends, make_learner, tmp_path, tiny_net, open_files):
    was, threads = open_files(), threading.active_count()
    for i in range(3):
        learn = make_learner(cbs=[*methods['akd'](tiny_net(seed=7)), KeepEpochs(overwrite=True),
                                  Resume(tmp_path/'r', every=1)], metrics=RobustAccuracy(pgd, n=8))
        learn.dls.rng.seed(0)
        if ends == 'well': learn.fit(2); (tmp_path/'r').unlink()
        else:
            with pytest.raises(ZeroDivisionError):
                learn.fit(2, cbs=Callback(after_backward=lambda self: 1/(self.train_iter != 3 + i) and None))
        learn.robustness(['clean','pgd2'], .1, state_path=tmp_path/f's{i}')
        Teacher.at_epoch(learn.path/'models', 'best', tiny_net())
    gc.collect()
    assert not open_files() - was and threading.active_count() <= threads

# --- whatever stops it ---

def fresh(make_learner, make_dls, tiny_net, name, **kwargs):
    return make_learner(make_dls(n=96, n_valid=32, shuffle=False, bs=32), tiny_net(dropout=.2),
                        cbs=methods[name](tiny_net(seed=7)), metrics=[RobustAccuracy(PGD(.1, steps=1), n=8)], **kwargs)

def seeded_fit(learn):
    torch.manual_seed(5); random.seed(5); np.random.seed(5)
    learn.fit(1, .01)
    return learn.model

def goes_on_as_new(learn, other):
    """Raise unless a fit of `learn`, which was stopped, is to the bit that of the fresh Learner `other` from the
    same weights and optimiser"""
    assert not learn.lock.locked() and torch.is_grad_enabled() and not torch.is_autocast_enabled()
    assert all(p.requires_grad for p in learn.model.parameters())
    assert not any('forward' in vars(m) or m._forward_hooks for m in learn.model.modules())
    state, opt = copy.deepcopy(learn.model.state_dict()), learn.opt and copy.deepcopy(learn.opt.state_dict())
    other.create_opt(); other.model.load_state_dict(state)
    if opt: other.opt.load_state_dict(opt)
    got, want = seeded_fit(learn), seeded_fit(other)
    assert all(torch.equal(v, want.state_dict()[k]) for k,v in got.state_dict().items())
    assert [m.training for m in got.modules()] == [m.training for m in want.modules()]
    assert str([list(v)[:-1] for v in learn.recorder.values[-1:]]) == str([list(v)[:-1] for v in other.recorder.values])

class Raises(Callback):
    "Raises `error` in `event`, the second time that it comes around where it does"
    def __init__(self, event, error, order):
        self.order, self.n = order, 0
        def now():
            self.n += 1
            if self.n == (1 if 'fit' in event else 2): raise error('stopped')
        setattr(self, event, now)
class Cancels(Callback):
    "Raises fastai's own exception `what`, so that there is an `after_cancel`"
    order = 60
    def __init__(self, event, what, training=True):
        def now():
            if self.learn.training == training and self.epoch < 2: raise what()
        setattr(self, event, now)
cancels = dict(after_cancel_batch=('after_loss', CancelBatchException),
               after_cancel_backward=('before_backward', CancelBackwardException),
               after_cancel_step=('before_step', CancelStepException),
               after_cancel_train=('after_batch', CancelTrainException),
               after_cancel_validate=('after_batch', CancelValidException, False),
               after_cancel_epoch=('before_train', CancelEpochException),
               after_cancel_fit=('after_batch', CancelFitException))
# in that there is no Learner yet
events = [e for e in vars(event) if e.split('_')[0] in ('before','after') and e != 'after_create']

def test_these_are_all_events(): assert len(events) == 23 and {e for e in events if 'cancel' in e} == set(cancels)

@pytest.mark.few(30)
@pytest.mark.parametrize('first', [True, False], ids=['before all others','after all others'])
@pytest.mark.parametrize('name', ['akd','rslad'])
@pytest.mark.parametrize('event', events)
def test_raised_in_any_event(event, name, first, make_learner, make_dls, tiny_net):
    make = lambda: fresh(make_learner, make_dls, tiny_net, name)
    error = RuntimeError if first == (name == 'akd') else KeyboardInterrupt
    learn = make()
    cbs = ([raises := Raises(event, error, -1000 if first else 1000)]
           + ([Cancels(*cancels[event])] if event in cancels else []))
    with pytest.raises(error, match='stopped'): learn.fit(3, .01, cbs=cbs)
    assert raises.n
    goes_on_as_new(learn, make())

def cut(mp, owner, name, n):
    "Make the `n`-th call of `owner.name` Ctrl-C"
    f, calls = getattr(owner, name), []
    def g(*args, **kwargs):
        calls.append(1)
        if len(calls) == n: raise KeyboardInterrupt
        return f(*args, **kwargs)
    mp.setattr(owner, name, g)
def ctrl_c_after(n):
    return (lambda *_, calls=[]: calls.append(1) or (_ for _ in ()).throw(KeyboardInterrupt())
            if len(calls) == n-1 else calls.append(1))

places = dict( # how to lay it: (Learner, the how manieth call, monkeypatch), what to take off afterwards
    attack=lambda l, n, mp: cut(mp, PGD, '_ascend', n),
    step_of_the_attack=lambda l, n, mp: cut(mp, PGD, 'loss', n),
    forward=lambda l, n, mp: cut(mp, nn.Linear, 'forward', n),
    teacher=lambda l, n, mp: cut(mp, Teacher, 'probs', n),
    backward=lambda l, n, mp: l.model[0].weight.register_hook(ctrl_c_after(n)),
    hook=lambda l, n, mp: l.model[2].register_forward_pre_hook(ctrl_c_after(n)),
    step=lambda l, n, mp: (l.create_opt(), cut(mp, l.opt, 'step', n))[0],
    loss=lambda l, n, mp: cut(mp, torch.nn.functional, 'log_softmax', n),
    data=lambda l, n, mp: cut(mp, l.dls.train, 'create_item', 33*n),
    metric=lambda l, n, mp: cut(mp, RobustAccuracy, 'accumulate', n),
    statistics=lambda l, n, mp: cut(mp, nn.BatchNorm2d, 'forward', n),
    average=lambda l, n, mp: cut(mp, WeightAveraging, '_load', n))

@pytest.mark.few(20)
@pytest.mark.parametrize('n', [1, 2, 4])
@pytest.mark.parametrize('where,name', [(p, name) for p in places for name in ('akd','rslad')
                                        if (p, name) != ('average','rslad')])
def test_interrupted_in(where, name, n, make_learner, make_dls, tiny_net, monkeypatch):
    make = lambda: fresh(make_learner, make_dls, tiny_net, name)
    learn = make()
    with monkeypatch.context() as mp:
        hook = places[where](learn, n, mp)
        with pytest.raises(KeyboardInterrupt): learn.fit(6, .01)
        if hook is not None: hook.remove()
    goes_on_as_new(learn, make())

class At:
    """Ctrl-C at the `n`-th line of this package that Python executes; it looks for Ctrl-C at calls and jumps, and at
    no `try`"""
    def __init__(self, n): self.left, self.where = n, None
    def __call__(self, frame, what, arg):
        return (self.line if '/rkd_fastai/' in frame.f_code.co_filename
                and '/tests/' not in frame.f_code.co_filename else None)
    def line(self, frame, what, arg):
        if what != 'line' or linecache.getline(frame.f_code.co_filename,
                                               frame.f_lineno).strip() in ('try:', 'finally:', 'try: put_back()'):
            return self.line
        self.left -= 1
        if not self.left:
            self.where = f'{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}'
            raise KeyboardInterrupt
        return self.line

def interrupted(f, n):
    "Call `f` with Ctrl-C at line `n`: where that was, None after the last line"
    at, old = At(n), sys.gettrace()
    sys.settrace(at)
    try: f()
    except KeyboardInterrupt: pass
    finally: sys.settrace(old)
    return at.where

def at_every(lines, name, make_learner, make_dls, tiny_net):
    make = lambda: fresh(make_learner, make_dls, tiny_net, name)
    for n in lines:
        learn = make()
        random.seed(0); np.random.seed(0); torch.manual_seed(0)
        where = interrupted(lambda: learn.fit(1, .01), n)
        if where is None: return n
        try: goes_on_as_new(learn, make())
        except Exception as e: raise AssertionError(f'Ctrl-C at {where}, line {n}') from e

@pytest.mark.few(2)
@pytest.mark.parametrize('name', methods)
def test_ctrl_c_at_some_lines(name, make_learner, make_dls, tiny_net):
    at_every(np.random.default_rng(0).integers(1, 2500, 12).tolist(), name, make_learner, make_dls, tiny_net)

@pytest.mark.slow
@pytest.mark.parametrize('name', methods)
def test_ctrl_c_at_every_seventh_line(name, make_learner, make_dls, tiny_net):
    assert at_every(range(1, 100_000, 7), name, make_learner, make_dls, tiny_net) > 1500

@pytest.mark.few(1)
@pytest.mark.parametrize('known', [False, True])
def test_interrupted_attack_leaves_the_model(known, tiny_net, snapshot):
    "At every line, of the first attack on a network and of a later one"
    x, y, attack, n = torch.rand(4, 1, 8, 8), torch.arange(4), PGD(.1, steps=1, random_start=False), 0
    while True:
        net = tiny_net()
        net[0].weight.requires_grad_(False); net[2].eval()
        if known: attack(net, x, y)
        was, n = snapshot.take(net), n + 1
        where = interrupted(lambda: attack(net, x, y), n)
        assert snapshot.same(snapshot.take(net), was) and torch.is_grad_enabled(), where
        assert not any('forward' in vars(m) or m._forward_hooks for m in net.modules()), where
        if where is None: break
        assert torch.equal(attack(net, x, y), attack(copy.deepcopy(net), x, y)), where
    assert n > (100 if known else 300)

def test_interrupted_measurement_goes_on(plain_net, test_images, tmp_path):
    "`robustness` with a state file: cut off at any line, it ends with the same flags"
    x, y = (o[:12] for o in test_images)
    run = lambda path=None: measure_robustness(plain_net, x, y, ['clean','pgd2'], .1, bs=4, state_path=path)
    want = run()
    for n in range(40, 4000, 331):
        path = tmp_path/f'{n}'
        if interrupted(lambda: run(path), n) is None: break
        assert run(path).results == want.results and torch.equal(run(path).flags['pgd2'], want.flags['pgd2'])
        assert not list(tmp_path.glob('.*.tmp'))
    assert n > 1000
