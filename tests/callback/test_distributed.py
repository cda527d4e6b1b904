"""Several processes through fastai's `distrib_ctx`: two on the CPU, started by `accelerate launch` on this very file.

They run `main`, which trains everything that the tests look at and leaves it in a file per process: one start for all
tests.
"""
import faulthandler, os, subprocess, sys
from collections import Counter

import numpy as np, pytest, torch, torch.nn as nn
from fastai.distributed import DistributedDL
from fastai.vision.all import (SGD, BnFreeze, Callback, CrossEntropyLossFlat, Learner, Normalize, ProgressCallback,
                               num_distrib, rank_distrib, set_seed)
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel as DDP

from rkd_fastai.all import *
from rkd_fastai.callback.adversarial import RobustCallback
from rkd_fastai.evaluation.robustness import robust_flags
from rkd_fastai.sampling import sample_positions

LAUNCH = 'accelerate launch --multi_gpu --num_processes 2'.split()
WORLD, BS, N, N_VALID = 2, 16, 96, 47 # an odd number to validate on: one process sees an image twice
STILL = PGD(.1, steps=2, random_start=False)
methods, norms = ['akd', 'rslad', 'ard'], ['none', 'frozen', 'trained']
each = pytest.mark.parametrize('name', methods)

# --- the script that one process or two run ---

def net(norm='trained', seed=0):
    torch.manual_seed(seed)
    bn = nn.Identity() if norm == 'none' else nn.BatchNorm2d(8)
    # `BnFreeze` keeps the statistics where the weights are frozen
    if norm == 'frozen': bn.requires_grad_(False).running_var.fill_(.5)
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), bn, nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))

def digits(grey=False):
    """Digits in the order in which the steps take the same images, whether one process takes them or two, each from
    its half"""
    o = load_digits()
    order = np.arange(N).reshape(WORLD, -1, BS) # process, step, image
    if not num_distrib(): order = order.swapaxes(0, 1)
    order = np.r_[order.ravel(), N:N+N_VALID]
    x, y = (o.images[order]*255/16).round().astype(np.uint8), o.target[order]
    if grey: x[:] = 51
    dls = arrays_dls((x[:N], y[:N]), (x[N:], y[N:]), vocab=list(range(10)), bs=BS*WORLD//max(num_distrib(), 1),
                     device='cpu')
    dls.train.shuffle = False
    if not grey: dls.add_tfms([Normalize.from_stats([.3], [.25], cuda=False)], 'after_batch')
    return dls

class Spy(Callback):
    "What a fit wraps, how often the wrapped student runs in training, and what it runs on"
    order, run_valid = 50, False
    def before_fit(self):
        self.wrapped, self.forwards, self.xb = type(self.model), 0, []
        # of the Learner: attacks use eval mode
        self.model.register_forward_hook(lambda *_: setattr(self, 'forwards', self.forwards + self.training))
    def before_batch(self): self.xb.append(self.learn.xb[0].detach().clone())

def learner(name=None, norm='none', grey=False, attack=STILL, path='.', cbs=(), **kwargs):
    "A Learner with plain SGD, so that a step is the gradient, without our callback where `name` is None"
    learn = Learner(digits(grey), net(norm), loss_func=CrossEntropyLossFlat(), opt_func=SGD, wd=0., moms=(0.,0.,0.),
                    path=path, cbs=[Spy(), BnFreeze(), *cbs], **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn.to_rkd(net(seed=7), name, attack=attack) if name else learn

def fit(learn, seed=3):
    set_seed(seed)
    # without a launcher it changes nothing; `SyncBatchNorm` needs a GPU
    with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(2, .1)
    return learn

def collectives(learn):
    "How often a fit calls each collective of PyTorch, from Python or from C++"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof: fit(learn)
    return Counter(e.name for e in prof.events() if e.name.startswith('c10d::'))

def state(model): return {k: v.clone() for k,v in model.state_dict().items()}

def trained(name, norm):
    metrics = [RobustAccuracy(STILL), RobustAccuracy(STILL, n=21)]
    learn = fit(learner(name, norm, metrics=metrics))
    teacher = next(cb for cb in learn.cbs if isinstance(cb, RobustCallback)).teacher
    return dict(state=state(learn.model), robust=[v[2:] for v in learn.recorder.values], model=type(learn.model),
                wrapped=learn.spy.wrapped, forwards=learn.spy.forwards, teacher=state(teacher),
                teacher_modules={type(m) for m in teacher.modules()})

def noise(seed):
    "The random starts of the attack on grey images, a batch each, and the weights they lead to"
    learn = fit(learner('akd', grey=True, attack=PGD(.1, steps=0)), seed)
    return torch.stack(learn.spy.xb) - .2, state(learn.model)

def watched():
    """What `CatastrophicOverfitting` takes for the best accuracy where one process alone sees a collapse, which
    images it looks at, and how many epochs there were"""
    from rkd_fastai.callback import monitor
    accs, seen = iter([(.5, .9), (.8, .1)]), []
    measure, monitor.robust_accuracy = monitor.robust_accuracy, lambda model, x, y, attack: (
        seen.append((len(x), y.tolist())), next(accs)[rank_distrib()])[1]
    cb = CatastrophicOverfitting(STILL, n=N_VALID, stop=True)
    learn = fit(learner('akd', cbs=[cb]))
    monitor.robust_accuracy = measure
    return cb.best, seen, len(learn.recorder.values)

def main(out):
    # a process that hangs says where, and is gone before the launcher is
    faulthandler.dump_traceback_later(120, exit=True)
    def broadcast(self, t, rank): # fastai's own needs a GPU
        t = torch.tensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = broadcast
    res = {(name, norm): trained(name, norm) for name in methods for norm in norms}
    res['watched'] = watched()
    res['noise'] = [noise(3), noise(3), noise(4)]
    res['collectives'] = {name: collectives(learner(name)) for name in [None, *methods]}
    fit(learner('akd', 'trained', path=f'{out}/{rank_distrib()}', cbs=[KeepEpochs()])).save('last', with_opt=False)
    try: fit(learner('akd', path=f'{out}/{rank_distrib()}', cbs=[KeepEpochs()]))
    except ValueError as e: res['refused'] = str(e)
    torch.save(res, f'{out}/{rank_distrib()}.pt')

# --- the tests ---

@pytest.fixture(scope='module')
def out(tmp_path_factory):
    "The folder in which two processes have left their results"
    out = tmp_path_factory.mktemp('distributed')
    # port 0: a free one
    cmd = [sys.executable, '-m', 'accelerate.commands.launch', *LAUNCH[2:], '--main_process_port', '0', __file__, out]
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='',
                            HF_HOME=str(out))
    res = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=150)
    assert res.returncode == 0, res.stdout[-2000:] + res.stderr[-8000:]
    return out

@pytest.fixture(scope='module')
def ranks(out): return [torch.load(out/f'{r}.pt', weights_only=False) for r in range(WORLD)]

def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

@each
@pytest.mark.parametrize('norm', norms)
def test_processes_end_with_the_same_weights(name, norm, ranks):
    a, b = (r[name,norm] for r in ranks)
    assert same(a['state'], b['state']) and not same(a['state'], net(norm).state_dict())

@each
@pytest.mark.parametrize('norm', ['none', 'frozen'])
def test_two_processes_are_one_with_twice_the_batch(name, norm, ranks):
    ours, one = ranks[0][name,norm], trained(name, norm)
    for k,v in one['state'].items(): torch.testing.assert_close(ours['state'][k], v, rtol=0, atol=1e-5)
    assert max((v - net(norm).state_dict()[k]).abs().max() for k,v in one['state'].items()) > 1e-2

@each
def test_robust_accuracy_is_that_of_all_images(name, ranks):
    "As of one process, epoch by epoch, with no image counted twice; also of a sample, which is that of one process"
    one, model = trained(name, 'none'), net('none')
    model.load_state_dict(one['state'])
    x, y = (torch.cat([b.as_subclass(torch.Tensor) for b in bs]) for bs in zip(*digits().valid))
    flags = robust_flags(PixelModel(model, [.3], [.25]), x*.25 + .3, y, STILL).float()
    few = flags[sample_positions(y, 21)]
    for r in ranks:
        got = r[name,'none']['robust']
        assert [v[0] for v in got] == pytest.approx([v[0] for v in one['robust']], abs=1e-7)
        assert list(got[-1]) == pytest.approx([flags.mean().item(), few.mean().item()], abs=1e-7)
    assert list(one['robust'][-1]) == pytest.approx([flags.mean().item(), few.mean().item()], abs=1e-7)

@each
def test_only_the_student_is_wrapped(name, ranks):
    "While it trains; the teacher, as it was, is the same network everywhere"
    for r in ranks:
        got = r[name,'trained']
        assert got['wrapped'] is DDP and got['model'] is nn.Sequential
        assert DDP not in got['teacher_modules'] and same(got['teacher'], Teacher(net(seed=7)).state_dict())

@each
def test_the_attack_synchronises_nothing(name, ranks):
    """The wrapped student runs once a step, its second pass goes past the wrapper, and the processes talk as often
    as in plain fastai training"""
    steps = 2*N//(WORLD*BS)
    for r in ranks:
        assert all(r[name,norm]['forwards'] == steps for norm in norms)
        assert r['collectives'][name] == r['collectives'][None]
        assert r['collectives'][name]['c10d::allreduce_'] >= steps

def test_random_starts(ranks):
    "From one seed each process draws noise of its own, fills the ball with it, and draws it again from that seed"
    (a, again, other), (b, b_again, _) = ([n for n,_ in r['noise']] for r in ranks)
    for x in (a, b):
        assert x.abs().max() <= .1 + 1e-6 and (x > .09).any() and (x < -.09).any()
        assert all((p - q).abs().max() > .05 for i,p in enumerate(x) for q in x[:i]) # from step to step
    assert all((p - q).abs().max() > .05 for p in a for q in b) and (a - other).abs().max() > .05
    assert torch.equal(a, again) and torch.equal(b, b_again)
    assert all(same(p[1], q[1]) for p,q in zip(*(r['noise'] for r in ranks)))

def test_random_starts_of_one_process_are_pytorchs():
    "Nothing is drawn in between: the same numbers as before there were several"
    class Before(Callback):
        order, run_valid = 4, False
        def before_fit(self): self.rng = []
        def before_batch(self): self.rng.append(torch.get_rng_state())
    learn = fit(learner('akd', grey=True, attack=PGD(.1, steps=0), cbs=[Before()]))
    for rng,xb in zip(learn.before.rng, learn.spy.xb):
        torch.set_rng_state(rng)
        torch.testing.assert_close(xb, .2 + torch.empty_like(xb).uniform_(-.1, .1), rtol=0, atol=1e-6)

def test_checkpoints(out):
    "The first process alone saves, and what it saves is the student without its wrapping"
    files = [sorted(f.name for f in out.glob(f'{r}/models/*')) for r in range(WORLD)]
    assert files == [['epoch_1.json', 'epoch_1.pth', 'epoch_2.json', 'epoch_2.pth', 'last.pth'], []]
    saved = [torch.load(out/'0'/'models'/f, weights_only=True) for f in files[0] if f.endswith('.pth')]
    for s in saved: net().load_state_dict(s)
    assert same(saved[1], saved[2])

def test_epochs_of_another_run_are_refused_by_all(ranks):
    "Though the first process alone sees them: the second would wait for it without end"
    assert (['epoch_1 to epoch_2 of another training run' in r['refused'] for r in ranks] == [True, False]
            and 'contains epochs of another training run' in ranks[1]['refused'])

if __name__ == '__main__': main(sys.argv[1])

def test_a_collapse_is_one_for_all(ranks):
    """The first process's accuracy of the same images counts in each, or one would end the fit while the others wait
    for it"""
    a, b = (r['watched'] for r in ranks)
    assert a == b and a[0] == .8 and a[1][0][0] == N_VALID and a[2] == 2
