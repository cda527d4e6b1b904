"""`Resume`: whatever is killed wherever goes on with the same bits; another training run, a bad file and a full disk
are refused and change nothing."""
import errno, functools, gc, os, pickle, random, signal, subprocess, sys, time, warnings, weakref

import numpy as np, pytest, torch, torch.nn as nn
from fastai.vision.all import (SGD, Callback, CrossEntropyLossFlat, CSVLogger, CutMix, DataLoaders,
                               EarlyStoppingCallback, GradientAccumulation, GradientClip, L,
                               LabelSmoothingCrossEntropyFlat, MixUp, OptimWrapper, PartialDL, ProgressCallback,
                               ReduceLROnPlateau, SaveModelCallback, TensorImage, Transform, accuracy,
                               aug_transforms, load_learner, params, set_seed)

from rkd_fastai.all import *
from rkd_fastai.callback.core import EachEpoch
from rkd_fastai.checkpoint import load_plain, read_card

loads = pytest.mark.filterwarnings('ignore:.*numpy.core is deprecated') # fastai's `learn.load`
attack = PGD(.1, steps=2)

class Die(Callback):
    "A power cut at the first `event` after `step` training batches; after all others, and no part of the training"
    order, only_shows = 2000, True
    def __init__(self, step, event='after_batch'):
        def interrupt():
            if self.learn.train_iter == step and not self.learn.lock.locked(): raise KeyboardInterrupt
        setattr(self, event, interrupt)
class Where(Callback):
    "What a callback is told about the place in the training"
    order, run_valid, only_shows = -5, False, True # right after `TrainEvalCallback`
    def before_fit(self): self.seen = []
    def before_batch(self):
        self.seen.append((self.epoch, self.iter, self.train_iter, self.n_iter, self.n_epoch, self.pct_train))
class Draws(Transform):
    "A transform of the training batch by Python's, NumPy's and PyTorch's random numbers"
    order, split_idx = 20, 0
    def __init__(self, size=8): self.size = size
    def encodes(self, x: TensorImage):
        return x*(1 - random.random()/self.size)*(1 - np.random.rand()/self.size)*(
            1 - torch.rand(len(x),1,1,1)/self.size)

@pytest.fixture
def base(make_learner, make_dls, tiny_net, tmp_path):
    "Factory of Learners with 4 batches an epoch: network 0 unless told, teacher and images always the same"
    def make(net=0, dls=None, cbs=(), model=None, teacher=None, **kwargs):
        if dls is None: dls = make_dls(n=128)
        if callable(teacher): cbs = [teacher(tiny_net(seed=7)), *L(cbs)]
        return make_learner(dls, tiny_net(seed=net, dropout=.3) if model is None else model, cbs=cbs,
                            **dict(metrics=accuracy) | kwargs)
    return make

def one_cycle(learn, cbs=()): learn.fit_one_cycle(3, .01, cbs=cbs)
def bits(o):
    "`o` as something that only the same bits equal"
    if isinstance(o, torch.Tensor): return str(o.dtype), tuple(o.shape), o.detach().cpu().contiguous().numpy().tobytes()
    if isinstance(o, dict): return {k: bits(v) for k,v in o.items()}
    return [bits(v) for v in o] if isinstance(o, (list, tuple, L)) else o
def weights(learn): return bits(learn.model.state_dict())
def end(learn):
    "All that a run leaves behind"
    rec, rng = learn.recorder, getattr(learn.dls.train, 'rng', None)
    return dict(
        weights=weights(learn), opt=bits(learn.opt.state_dict()), lrs=[float(v) for v in rec.lrs],
        losses=[v.item() for v in rec.losses], values=[list(v) for v in rec.values], iters=list(rec.iters),
        smooth=(rec.smooth_loss.count, rec.smooth_loss.val.item()),
        hps={k: np.array(v).tolist() for k,v in getattr(rec, 'hps', {}).items()}, names=list(rec.metric_names),
        train_iter=learn.train_iter, n_epoch=learn.n_epoch,
        python=random.getstate(), numpy=[bits(torch.tensor(v)) for v in np.random.get_state()[1:]],
        torch=bits(torch.get_rng_state()), order=rng and rng.getstate())
def differ(a, b): return [k for k in a if a[k] != b[k]]
def run(make, fit, cbs=(), seed=0, dies=False, **kwargs):
    "A Learner made and trained from `seed`, and killed in it where `dies`"
    set_seed(seed)
    learn = make(**kwargs)
    if dies:
        with pytest.raises(KeyboardInterrupt): fit(learn, cbs)
    else: fit(learn, cbs)
    return learn
def check(make, folder, fit=one_cycle, kills=((None, 6),), event='after_batch'):
    """Raise unless a run kept `every` batches and killed at `step` goes on, from another network and other
    random numbers, to the end of a whole one without `Resume`"""
    want = end(run(make, fit))
    for every,step in kills:
        path = folder/f'{every}_{step}.pth'
        run(make, fit, [Resume(path, every), Die(step, event)], dies=True)
        resumed = run(make, fit, [Resume(path)], seed=99, net=5)
        assert differ(end(resumed), want) == [], f'{every=} {step=}'
    return resumed


# --- the same bits ---

@pytest.mark.few(1)
@pytest.mark.parametrize('every', [None, 1, 3])
def test_killed_after_any_batch(every, base, make_dls, tmp_path):
    "Twelve batches, and a power cut after each of them"
    make = lambda **kw: base(**kw, dls=make_dls(n=128, batch_tfms=[PadCropFlip(1), Draws()]),
                             cbs=[AdversarialTraining(PGD(.1, steps=1)), WeightAveraging(.9)])
    check(make, tmp_path, kills=[(every, step) for step in range(every or 5, 13)]) # from the first that is kept on

@pytest.mark.few(5)
@pytest.mark.parametrize('event,step', [('before_train', 4), ('before_epoch', 8), ('before_batch', 7),
                                        ('after_loss', 6), ('before_backward', 6), ('after_backward', 5),
                                        ('before_step', 6), ('after_step', 9), ('after_train', 8),
                                        ('before_validate', 8), ('after_epoch', 8), ('after_fit', 12)])
def test_killed_at_any_event(event, step, base, tmp_path):
    "A gradient that was on its way counts once"
    check(base, tmp_path, kills=[(None, step), (2, step)], event=event)

kinds = dict(
    natural = dict(),
    at = dict(teacher=lambda t: AdversarialTraining(attack)),
    trades = dict(teacher=lambda t: TRADES(PGD(.1, steps=2, objective='kl'))),
    akd = dict(teacher=lambda t: AKDCallback(t, attack=attack)),
    rslad_cache = dict(teacher=lambda t: RSLADCallback(t, attack=attack, cache=True)),
    ckd_cache = dict(teacher=lambda t: CKDCallback(t, cache=True, T=2.)),
    averaging = dict(cbs=lambda: WeightAveraging()),
    clip = dict(cbs=lambda: GradientClip(.1)),
    accumulation = dict(cbs=lambda: [GradientAccumulation(96), GradientClip(.1)]),
    accumulation_at = dict(teacher=lambda t: AdversarialTraining(attack), cbs=lambda: GradientAccumulation(96)),
    mixup = dict(cbs=lambda: MixUp(.4)),
    mixup_akd = dict(teacher=lambda t: AKDCallback(t, attack=attack), cbs=lambda: MixUp(.4)),
    cutmix = dict(cbs=lambda: CutMix(1.)),
    cutmix_at = dict(teacher=lambda t: AdversarialTraining(attack), cbs=lambda: CutMix(1.)),
    robust_accuracy = dict(teacher=lambda t: AdversarialTraining(attack),
                           metrics=lambda: [accuracy, RobustAccuracy(attack, n=20)]),
    smoothing = dict(loss_func=lambda: LabelSmoothingCrossEntropyFlat()),
    groups = dict(splitter=lambda: lambda m: [params(m[:3]), params(m[3:])], wd=lambda: [.1, .01]),
    sgd = dict(opt_func=lambda: SGD),
    nesterov = dict(opt_func=lambda: sgd_nesterov),
    adamw = dict(opt_func=lambda: lambda ps, lr: OptimWrapper(ps, torch.optim.AdamW, lr=lr)),
    everything = dict(teacher=lambda t: AKDCallback(t, attack=attack),
                      cbs=lambda: [WeightAveraging(), GradientAccumulation(64), GradientClip(.1), MixUp(.4)],
                      opt_func=lambda: sgd_nesterov))

@pytest.mark.few(8)
@pytest.mark.parametrize('kind', kinds)
def test_every_training(kind, base, tmp_path):
    "Methods, callbacks, losses and optimisers, killed in the second epoch"
    made = lambda: {k: v if k == 'teacher' else v() for k,v in kinds[kind].items()}
    check(lambda **kw: base(**kw, **made()), tmp_path, kills=[(None, 6), (3, 8)])

fits = dict(
    fit=lambda l, cbs: l.fit(3, .01, cbs=cbs),
    one_cycle=one_cycle,
    flat_cos=lambda l, cbs: l.fit_flat_cos(3, .01, cbs=cbs),
    exp=lambda l, cbs: l.fit_exp(3, .01, cbs=cbs),
    rkd=lambda l, cbs: l.fit_rkd(3, .01, cbs=cbs),
    sliced=lambda l, cbs: l.fit_one_cycle(3, slice(.001, .01), cbs=cbs),
    later=lambda l, cbs: l.fit_one_cycle(3, .01, start_epoch=1, cbs=cbs))
@pytest.mark.parametrize('how', fits)
def test_every_schedule(how, base, tmp_path):
    "`start_epoch` skips the first epoch, of which there is no batch to remember"
    step = 3 if how == 'later' else 6
    check(lambda **kw: base(**kw, splitter=lambda m: [params(m[:3]), params(m[3:])]), tmp_path, fits[how],
          [(None, step), (3, step+1)])

class Counting(nn.Module):
    "Counts its training steps in its extra state"
    def __init__(self, net): super().__init__(); self.net, self.steps = net, 0
    def forward(self, x): self.steps += self.training; return self.net(x)
    def get_extra_state(self): return dict(steps=self.steps, mark=b'x')
    def set_extra_state(self, state): self.steps = state['steps']

def test_extra_state(base, tiny_net, tmp_path):
    "What `get_extra_state` returns goes on, the average's too"
    make = lambda net=0, **kw: base(**kw, model=Counting(tiny_net(seed=net)),
                                    cbs=[WeightAveraging(.9), RobustOverfitting('accuracy', restore=True)])
    assert check(make, tmp_path, kills=[(None, 6), (3, 8)]).model.steps == 12

def partial_dls(make_dls):
    dls = make_dls(n=160)
    return DataLoaders(PartialDL(dls.train_ds, bs=32, partial_n=128, shuffle=True, num_workers=0,
                                 after_batch=dls.train.after_batch), dls.valid)
def torch_dls(digits, generator=None, workers=0):
    ds = lambda a, b: torch.utils.data.TensorDataset(digits.x[a:b], digits.y[a:b])
    return DataLoaders(torch.utils.data.DataLoader(ds(0, 128), 32, shuffle=True,
                                                   generator=generator and torch.Generator().manual_seed(3),
                                                   num_workers=workers),
                       torch.utils.data.DataLoader(ds(128, 176), 32))
class Mixed: # synthetic images
    x, y = np.random.default_rng(0).integers(0, 256, (40,8,8), dtype=np.uint8), np.arange(40) % 10
loaders = dict(
    resident = lambda make, digits: make(n=128, device_resident=True, batch_tfms=[PadCropFlip(1), Draws()]),
    unshuffled = lambda make, digits: make(n=128, shuffle=False),
    ragged = lambda make, digits: make(n=120, shuffle=False), # the last batch is smaller
    normalised = lambda make, digits: make(n=128, stats=([.3], [.25])),
    synthetic = lambda make, digits: with_synthetic(make(n=128), (Mixed.x, Mixed.y), .5),
    resident_synthetic = lambda make, digits: with_synthetic(make(n=128, device_resident=True), (Mixed.x, Mixed.y), .5),
    augmented = lambda make, digits: make(n=128, batch_tfms=aug_transforms(size=8, pad_mode='zeros')),
    drawn_by_numpy = lambda make, digits: partial_dls(make))
by_epoch = dict(
    torch = lambda make, digits: torch_dls(digits),
    torch_generator = lambda make, digits: torch_dls(digits, generator=True),
    workers = lambda make, digits: make(n=128, num_workers=2, batch_tfms=[Draws()]))

@pytest.mark.few(4)
@pytest.mark.parametrize('kind', loaders)
def test_every_loader(kind, base, make_dls, digits, tmp_path):
    "The order of the images and what is done to them"
    check(lambda **kw: base(**kw, dls=loaders[kind](make_dls, digits)), tmp_path, kills=[(None, 6), (3, 8), (1, 5)])

@pytest.mark.parametrize('kind', by_epoch)
def test_loaders_that_go_on_by_epoch(kind, base, make_dls, digits, tmp_path):
    """In the middle of an epoch their random numbers are out of reach: `every` is refused before anything is done,
    and so is another's file of that kind"""
    make = lambda **kw: base(**kw, dls=by_epoch[kind](make_dls, digits))
    check(make, tmp_path)
    learn = make()
    before = weights(learn)
    with pytest.raises(ValueError, match='`every` needs a fastai DataLoader.*or remove `every`'):
        one_cycle(learn, Resume(tmp_path/'other.pth', every=1))
    assert weights(learn) == before and not (tmp_path/'other.pth').exists()

def test_several_processes(base, tmp_path, monkeypatch):
    monkeypatch.setattr('rkd_fastai.callback.resume.num_distrib', lambda: 2)
    with pytest.raises(ValueError, match='one process only.*: remove `Resume`, or train in one process'):
        one_cycle(base(), Resume(tmp_path/'run.pth'))

def test_a_middle_of_an_epoch_needs_its_loader(base, make_dls, tmp_path):
    "Kept with no workers, and told to go on with two"
    run(base, one_cycle, [Resume(tmp_path/'run.pth', 1), Die(6)], dies=True)
    learn = base(net=5, dls=make_dls(n=128, num_workers=2))
    before = weights(learn)
    with pytest.raises(ValueError, match='num_workers=0'): one_cycle(learn, Resume(tmp_path/'run.pth'))
    assert weights(learn) == before

class Stream(torch.utils.data.IterableDataset):
    "Images that cannot be indexed, of known number"
    def __init__(self, x, y): self.x, self.y = x, y
    def __iter__(self): return zip(self.x, self.y)
    def __len__(self): return len(self.x)
def test_streams(base, digits, tmp_path):
    "What was read cannot be left out: by epoch only"
    from fastai.data.load import DataLoader
    make = lambda **kw: base(**kw, dls=DataLoaders(*[DataLoader(Stream(digits.x[a:b], digits.y[a:b]), bs=32)
                                                     for a,b in ((0,128), (128,176))]))
    check(make, tmp_path)
    with pytest.raises(ValueError, match='`every` needs'): one_cycle(make(), Resume(tmp_path/'other.pth', every=1))

class Augmented(torch.utils.data.Dataset):
    "A data set that draws random numbers for each item, as torchvision's do"
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]*torch.rand(1)*random.random()*np.random.rand(), self.y[i]
def test_random_items(base, digits, tmp_path):
    "Looking at the data draws nothing, and sees the same data every time"
    dl = lambda a, b: torch.utils.data.DataLoader(Augmented(digits.x[a:b], digits.y[a:b]), 32, shuffle=True)
    check(lambda **kw: base(**kw, dls=DataLoaders(dl(0, 128), dl(128, 176))), tmp_path)

def test_what_callbacks_see(base, tmp_path):
    "Epoch, batch, part of the training: those of the whole run, for a callback that comes first too"
    def places(cbs, **kw):
        where = Where()
        run(base, one_cycle, [where, *cbs], **kw)
        return where.seen
    whole = places([])
    assert len(whole) == 12 and whole[6][:3] == (1, 2, 6)
    for step in (6, 8, 9): # the last of what was kept is the end of an epoch, and the third batch of one
        places([Resume(tmp_path/f'{step}.pth', 3), Die(step)], dies=True)
        assert places([Resume(tmp_path/f'{step}.pth', 3)]) == whole # the list itself is remembered

@pytest.mark.parametrize('step,known', [(2, 64), (6, 128)])
def test_the_cache_is_kept(step, known, base, tmp_path):
    "The teacher is asked about no image again, since in another batch its answer may have other last bits"
    asked = []
    class Asked(Callback):
        order, only_shows = 2000, True
        def before_train(self):
            kept = next(cb for cb in self.learn.cbs if isinstance(cb, RSLADCallback)).kept
            if self.epoch == step//4: kept.probs = lambda x, probs=kept.probs: (asked.append(len(x)), probs(x))[1]
    make = lambda **kw: base(**kw, teacher=lambda t: RSLADCallback(t, attack=attack, cache=True))
    run(make, one_cycle, [Resume(tmp_path/'run.pth', 2), Die(step)], dies=True)
    run(make, one_cycle, [Resume(tmp_path/'run.pth'), Asked()])
    assert sum(asked) == 128 - known

def test_train_metrics(base, tmp_path):
    "A mean over the training images takes in those of before"
    def make(**kw):
        learn = base(**kw)
        learn.recorder.train_metrics = True
        return learn
    check(make, tmp_path, kills=[(1, 6)])

def test_averages_at_the_end(base, tmp_path):
    "What `WeightAveraging` validated with is what is kept, of a run killed at its very end too"
    make = lambda **kw: base(**kw, cbs=WeightAveraging(.9))
    learn = check(make, tmp_path, kills=[(1, 12)], event='after_fit')
    assert learn.weight_averaging.ema is None and learn.weight_averaging.raw is None

def test_killed_again_and_again(base, make_dls, tmp_path):
    "By cuts at the 3rd, 5th, 6th, 6th again, 8th and 11th batch, with another `every` each time"
    make = lambda **kw: base(**kw, dls=make_dls(n=128, batch_tfms=[Draws()]),
                             teacher=lambda t: AKDCallback(t, attack=attack),
                             cbs=[WeightAveraging(), GradientAccumulation(96)])
    whole, path = end(run(make, one_cycle)), tmp_path/'run.pth'
    for i,(step,every) in enumerate([(3, 1), (5, 2), (6, 1), (6, 3), (8, None), (11, 3)]):
        run(make, one_cycle, [Resume(path, every), Die(step, 'before_batch' if i % 2 else 'after_batch')],
            seed=i, net=i, dies=True)
    assert differ(end(run(make, one_cycle, [Resume(path)], seed=9, net=9)), whole) == []

@pytest.mark.parametrize('event', ['after_batch', 'after_backward', 'before_train', 'after_train'])
def test_ctrl_c_and_the_same_learner(event, base, make_dls, tmp_path):
    "The cell is run again in the notebook, whose traceback keeps all frames; twice in a row"
    make = lambda **kw: base(**kw, dls=make_dls(n=128, batch_tfms=[Draws()]), cbs=[WeightAveraging(), GradientClip(.1)])
    whole, path, kept = end(run(make, one_cycle)), tmp_path/'run.pth', []
    set_seed(0)
    learn = make()
    for step,every in [(4 if 'train' in event else 5, 1), (8 if 'train' in event else 7, 2)]:
        with pytest.raises(KeyboardInterrupt) as e: one_cycle(learn, [Resume(path, every), Die(step, event)])
        kept.append(e)
    one_cycle(learn, Resume(path))
    assert differ(end(learn), whole) == []

def test_resume_that_stays(base, tmp_path):
    """Added for good: finding a learning rate, validating and predicting leave the file alone and go as without it,
    before the fit and after"""
    def use(learn):
        learn.lr_find(show_plot=False, num_it=5)
        return bits([torch.tensor(learn.validate()), *learn.get_preds(), *learn.get_preds(ds_idx=0)])
    path, first = tmp_path/'run.pth', base()
    second = base(dls=first.dls)
    order = first.dls.train.rng.getstate()
    def start(learn): set_seed(0); learn.dls.train.rng.setstate(order); return learn
    second.add_cb(Resume(path, 1))
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*numpy.core is deprecated')
        assert use(start(second)) == use(start(first)) and not path.exists()
        one_cycle(start(first)); want = end(first)
        one_cycle(start(second)); got = end(second)
        at_the_end = path.read_bytes()
        assert differ(got, want) == []
        assert use(second) == use(first) and path.read_bytes() == at_the_end

class Validates(Callback):
    "Validates, and predicts on the training images, in the middle of the fit"
    order, only_shows = 65, True
    def __init__(self, event):
        # before `TrainEvalCallback`, which goes back to training
        self.got, self.order = [], -20 if event.startswith('before') else 65
        def validate():
            if self.learn.lock.locked(): return
            if event == 'after_batch' and not (self.training and self.learn.iter == 2): return
            careful = dict(before_train=['dl'], after_batch=['training','dl','n_iter','xb','yb','pred','loss','epoch',
                                                             'train_iter','pct_train']).get(event, [])
            now = {k: getattr(self.learn, k) for k in careful} # what such a callback has to put back
            self.got.append((self.learn.validate(), bits(self.learn.get_preds(ds_idx=0))))
            for k,v in now.items(): setattr(self.learn, k, v)
            if event == 'after_batch': self.learn.model.train()
        setattr(self, event, validate)
@pytest.mark.few(4)
@pytest.mark.parametrize('event', ['before_epoch', 'before_train', 'after_train', 'after_epoch', 'after_batch'])
@pytest.mark.parametrize('every', [None, 1])
def test_validation_in_the_middle(event, every, base, make_dls, tmp_path):
    "A user's callback calls `validate` and `get_preds`: nothing is kept in them, and they see the whole of the images"
    def fit(cbs, **kw):
        v = Validates(event)
        learn = run(lambda **kw: base(**kw, dls=make_dls(n=128, batch_tfms=[Draws()])), one_cycle, [v, *cbs], **kw)
        return learn, v.got
    (whole, want), path = fit([]), tmp_path/'run.pth'
    fit([Resume(path, every), DieInTheThird()], dies=True)
    learn, got = fit([Resume(path)], seed=99, net=5)
    # what comes before an epoch comes again in the middle of it, with other weights
    same_place = every is None or event.startswith('after')
    seen = got if same_place else got[:-1] # the callback's list is remembered, too
    assert weights(learn) == weights(whole) and got and seen == want[len(want)-len(seen):] and learn.n_epoch == 3
class DieInTheThird(Callback):
    "A power cut after ten batches by its own count, since `validate` sets the Learner's to 0"
    order, only_shows = 2000, True
    def before_fit(self):
        if not self.learn.lock.locked(): self.n = 0
    def after_batch(self):
        if self.training and not self.learn.lock.locked():
            self.n += 1
            if self.n == 10: raise KeyboardInterrupt


# --- what callbacks remember ---

@loads
@pytest.mark.parametrize('every,step', [(None, 22), (3, 27)]) # some have waited by then
def test_trackers(every, step, base, tmp_path, capsys):
    "Best values, epochs waited and the rate that was lowered survive, of two `SaveModelCallback`s each its own"
    def make(**kw):
        return base(**kw, cbs=[SaveModelCallback(fname='by_loss'),
                               SaveModelCallback('accuracy', fname='by_acc', at_end=True),
                               ReduceLROnPlateau(patience=2, min_delta=.3),
                               EarlyStoppingCallback(patience=4, min_delta=.3)])
    fit = lambda l, cbs: l.fit(8, .03, cbs=cbs)
    def seen(learn):
        cbs = [cb for cb in learn.cbs if hasattr(cb, 'best')]
        return [(type(cb).__name__, cb.best, getattr(cb, 'wait', None), cb.new_best)
                for cb in cbs], [bits(torch.load(tmp_path/'models'/f'{n}.pth')) for n in ('by_loss','by_acc')]
    whole = run(make, fit)
    want, printed = (end(whole), seen(whole)), capsys.readouterr().out
    assert 'reducing lr' in printed and 'early stopping' in printed
    run(make, fit, [Resume(tmp_path/'run.pth', every), Die(step)], dies=True)
    first = capsys.readouterr().out
    again = run(make, fit, [Resume(tmp_path/'run.pth')], seed=9, net=5)
    assert differ(end(again), want[0]) == [] and seen(again) == want[1]
    assert first + capsys.readouterr().out == printed

class Watches(EachEpoch):
    "A user's callback that counts in this and that"
    remembers = ('sums',)
    def before_fit(self):
        from collections import Counter, defaultdict
        self.n, self.names, self.sums, self.counts, self.by_epoch, self.pairs, self.kind = (
            0, L(), [], Counter(), defaultdict(list), {}, signal.SIGTERM) # which is an `int`
    def each_epoch(self):
        self.n += 1
        self.names.append(f'{self.epoch}')
        self.sums.append(torch.tensor(self.n))
        self.counts[f'{self.epoch % 2}'] += 1
        self.by_epoch[self.epoch].append(self.n); self.pairs[self.epoch, 'x'] = np.float64(self.n)
def test_a_users_callback(base, tmp_path):
    "Numbers, lists, fastai's and those of `collections`: what they were, and of their kind"
    def fit(cbs, **kw): return run(lambda **k: base(**k, cbs=Watches()), one_cycle, cbs, **kw).watches
    whole = fit([])
    fit([Resume(tmp_path/'run.pth'), Die(6)], dies=True)
    again = fit([Resume(tmp_path/'run.pth')])
    for k in ('n','names','sums','counts','by_epoch','pairs','kind'):
        assert getattr(again, k) == getattr(whole, k) and type(getattr(again, k)) is type(getattr(whole, k)), k

def test_two_that_resume(base, tmp_path):
    "Would each have a say in where to go on"
    with pytest.raises(ValueError, match='two `Resume`'):
        run(base, one_cycle, [Resume(tmp_path/'run.pth'), Resume(tmp_path/'other.pth')])
    assert not [*tmp_path.iterdir()]

def test_two_of_a_kind(base, tmp_path):
    "Two callbacks of one class remember each their own, and which one is missing is noticed"
    class Sums(Callback):
        def __init__(self, by): self.by = by
        def before_fit(self): self.sum = 0
        def after_batch(self):
            if self.training: self.sum += self.by
    make = lambda **kw: base(**kw, cbs=[Sums(1), Sums(10)])
    run(make, one_cycle, [Resume(tmp_path/'run.pth'), Die(6)], dies=True)
    again = run(make, one_cycle, [Resume(tmp_path/'run.pth')], net=5)
    assert [cb.sum for cb in again.cbs if isinstance(cb, Sums)] == [12, 120]
    with pytest.raises(ValueError, match='another training run'):
        run(lambda **kw: base(**kw, cbs=Sums(10)), one_cycle, [Resume(tmp_path/'run.pth')])

@pytest.mark.parametrize('every,append,step', [(None, False, 6), (1, False, 8), (None, True, 9)])
def test_csv(every, append, step, base, tmp_path):
    "The log is that of the whole run, but for the time; `append` leaves the fits of before in it"
    path = tmp_path/'history.csv'
    def fit(cbs, **kw):
        log = CSVLogger(append=append)
        run(base, one_cycle, [log, *cbs], **kw)
        log.file.close() # which fastai forgets in an interrupted fit
    def start(): path.write_text('older\n1\n') if append else path.unlink(missing_ok=True)
    read = lambda: [','.join(l.split(',')[:-1]) if ',' in l else l for l in path.read_text().splitlines()]
    start(); fit([])
    whole = read()
    start(); fit([Resume(tmp_path/'run.pth', every), Die(step)], dies=True)
    with path.open('a') as f: f.write('1,.1,') # in the middle of a line
    fit([Resume(tmp_path/'run.pth')], seed=9, net=5)
    assert read() == whole and len(whole) == 4 + 2*append
    fit([Resume(tmp_path/'run.pth')]) # which is finished
    assert read() == whole

def test_kept_epochs(base, tmp_path):
    "Every epoch is kept once, under its own number"
    def fit(folder, cbs, **kw): run(lambda **k: base(**k, path=tmp_path/folder, cbs=KeepEpochs()), one_cycle, cbs, **kw)
    fit('whole', [])
    fit('parts', [Resume(tmp_path/'run.pth', 1), Die(6)], dies=True)
    fit('parts', [Resume(tmp_path/'run.pth')], seed=9, net=5)
    ids = [read_card(tmp_path/f'{k}/models/epoch_1.json')['training'] for k in ('whole','parts')]
    assert ids[0] != ids[1]
    for n in (1, 2, 3):
        a,b = (bits(torch.load(tmp_path/f'{k}/models/epoch_{n}.pth')) for k in ('whole','parts'))
        cards = [read_card(tmp_path/f'{k}/models/epoch_{n}.json') for k in ('whole','parts')]
        assert a == b and [c.pop('training') for c in cards] == ids and cards[0] == cards[1]

def test_robust_overfitting_restores(base, tmp_path, capsys):
    "The best epoch lies before the power cut"
    best_at_first = lambda: iter([.9, .5, .4, .3])
    def fit(cbs, scores, **kw):
        from fastai.vision.all import ValueMetric
        return run(lambda **k: base(**k, metrics=[accuracy, ValueMetric(lambda: next(scores), 'robust_accuracy')],
                                    cbs=RobustOverfitting(restore=True)), one_cycle, cbs, **kw)
    whole = fit([], best_at_first())
    printed = capsys.readouterr().out
    assert 'the weights of that epoch are restored' in printed
    scores = best_at_first()
    fit([Resume(tmp_path/'run.pth'), Die(6)], scores, dies=True)
    again = fit([Resume(tmp_path/'run.pth')], scores, seed=9, net=5)
    assert (differ(end(again), end(whole)) in ([], ['values']) and weights(again) == weights(whole)
            and capsys.readouterr().out == printed)

@pytest.mark.parametrize('stop', [True, False])
def test_catastrophic_overfitting(stop, base, tmp_path, monkeypatch, capsys):
    """The best accuracy and the last good weights survive; watching draws no random numbers, however often the
    images are read"""
    def fit(cbs, accs, **kw):
        monkeypatch.setattr('rkd_fastai.callback.monitor.robust_accuracy', lambda *_: next(accs))
        return run(lambda **k: base(**k, cbs=[AdversarialTraining(attack), CatastrophicOverfitting(n=8, stop=stop)]),
                   one_cycle, cbs, **kw)
    scores = [.5, .6, .61 if not stop else .1]
    whole = fit([], iter(scores))
    want = end(whole)
    fit([Resume(tmp_path/'run.pth'), Die(10)], iter(scores), dies=True)
    again = fit([Resume(tmp_path/'run.pth')], iter(scores[2:]), seed=9, net=5)
    assert differ(end(again), want) == []

def test_robust_accuracy_of_a_killed_validation(base, make_dls, tmp_path):
    "Killed while it validates, on more images than it trains on: the epoch's value is of all of them"
    class DieInValidation(Callback):
        only_shows, order = True, 2000
        def after_batch(self):
            if not self.training and self.learn.epoch == 1 and self.learn.iter == 6: raise KeyboardInterrupt
    make = lambda **kw: base(**kw, dls=make_dls(n=128, n_valid=288), metrics=[accuracy, RobustAccuracy(attack, n=40)],
                             cbs=[AdversarialTraining(attack), WeightAveraging(.9)])
    whole = end(run(make, one_cycle))
    run(make, one_cycle, [Resume(tmp_path/'run.pth', 1), DieInValidation()], dies=True)
    assert differ(end(run(make, one_cycle, [Resume(tmp_path/'run.pth')], seed=9, net=5)), whole) == []

def test_a_network_with_a_memory(base, tiny_net, tmp_path):
    "fastai looks up what a callback lacks in the Learner and the network: such names there are not the callback's"
    class Net(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.remembers, self.only_shows = net, ('net',), True
            self.register_buffer('memory', torch.zeros(3))
        def set_memory(self, m): raise AssertionError
        def forward(self, x): return self.net(x)
    make = lambda net=0, **kw: base(**kw, model=Net(tiny_net(seed=net)), cbs=[WeightAveraging(.9)])
    check(make, tmp_path)
    with pytest.raises(ValueError, match='weight_averaging'):
        one_cycle(base(model=Net(tiny_net())), Resume(tmp_path/'None_6.pth'))


# --- several fits of one run ---

def tuned(learn, cbs=()): learn.fine_tune(2, .01, cbs=cbs) # 4 batches, and then 8
def twice(learn, cbs=()): learn.fit(2, .01, cbs=cbs); learn.fit(2, .01, cbs=cbs)
def thrice(learn, cbs=()): learn.fit(1, .01, cbs=cbs); learn.fit_one_cycle(2, .02, cbs=cbs); learn.fit(1, .003, cbs=cbs)
sequences = dict(tuned=tuned, twice=twice, thrice=thrice)
class DieIn(Die):
    "A power cut in the `fit`-th fit, from 0, of the training"
    def __init__(self, fit, step, event='after_batch'):
        super().__init__(step, event)
        dies, fits = vars(self)[event], [] # not an attribute, which would be remembered
        setattr(self, event, lambda: dies() if len(fits) == fit+1 else None)
        self.before_fit = (lambda: None if self.learn.lock.locked() or hasattr(self.learn, 'lr_finder')
                           else fits.append(1))

def groups(base, **more):
    return lambda **kw: base(**kw, splitter=lambda m: [params(m[:3]), params(m[3:])],
                             **{k: v() for k,v in more.items()})
def until_killed(make, fit, folder, cuts, learner_wide=False, every=None):
    "A run killed at each of `cuts` in turn and begun again from its start, and at last left alone"
    for i,cut in enumerate([*cuts, None]):
        resume = Resume(folder/'run.pth', every)
        cbs = [DieIn(*cut)] if cut else []
        made,cbs = ((lambda **kw: make(**kw).add_cb(resume)), cbs) if learner_wide else (make, [resume, *cbs])
        learn = run(made, fit, cbs, seed=i and 90+i, net=i and 4+i, dies=bool(cut))
    return learn

@pytest.mark.few(3)
@pytest.mark.parametrize('every', [None, 3])
@pytest.mark.parametrize('how', sequences)
def test_killed_in_any_fit(how, every, base, make_dls, tmp_path):
    "Of `fine_tune`, and of fits one after another: the same bits, however often the script is killed and begun again"
    make = groups(base, cbs=lambda: [MixUp(.4), GradientAccumulation(96)],
                  dls=lambda: make_dls(n=128, batch_tfms=[PadCropFlip(1), Draws()]))
    want = end(run(make, sequences[how]))
    for i,cuts in enumerate([[(1, 2)], [(1, 4), (1, 6, 'before_batch')],
                             [(0, 8 if how == 'twice' else 4, 'after_fit'), (1, 0, 'before_train')]]
                            + [[(1, 8, 'after_fit'), (2, 1), (2, 4, 'after_fit')]]*(how == 'thrice')):
        (tmp_path/f'{i}').mkdir()
        assert differ(
            end(until_killed(make, sequences[how], tmp_path/f'{i}', cuts, learner_wide=i % 2, every=every)), want
        ) == [], cuts

def test_killed_in_the_first_of_two_fits(base, tmp_path):
    make = groups(base)
    assert differ(end(until_killed(make, tuned, tmp_path, [(0, 2), (1, 6)], every=1)), end(run(make, tuned))) == []

def test_a_second_fit_trains(base, tmp_path, capsys):
    "With a `Resume` that stays, after one that is finished, one of other settings too; a third after an interruption"
    want, path = run(base, twice), tmp_path/'run.pth'
    learn = run(lambda **kw: base(**kw).add_cb(Resume(path)), twice)
    assert differ(end(learn), end(want)) == [] and capsys.readouterr().out == ''
    for l in (want, learn):
        set_seed(3); l.dls.train.rng.seed(3)
        l.fit_one_cycle(1, .02)
    assert weights(learn) == weights(want)
    def end_of_first(learn, cbs=()): learn.fit(2, .01, cbs=cbs)
    other, first = base(net=5), run(base, end_of_first)
    other.fit(2, .01, cbs=Resume(path)) # in a new process
    assert differ(end(other), end(first)) == []
    printed = capsys.readouterr().out
    assert printed == f'`{path}`: fit 1 of 3 has ended and is not trained again\n'

def test_messages_of_several_fits(base, tmp_path, capsys):
    path = tmp_path/'run.pth'
    run(groups(base), tuned, [Resume(path), DieIn(1, 6)], dies=True)
    assert capsys.readouterr().out == ''
    run(groups(base), tuned, [Resume(path)])
    assert capsys.readouterr().out == (f'`{path}`: fit 1 of 2 has ended and is not trained again\n'
                                       f'`{path}`: fit 2 of 2 continues after 1 epoch\n')
    run(groups(base), tuned, [Resume(path)])
    assert f'`{path}` contains all 2 epochs of fit 2: nothing is left to train' in capsys.readouterr().out

@pytest.mark.parametrize('learner_wide', [False, True])
def test_ctrl_c_in_a_second_fit(learner_wide, base, tmp_path):
    "The cell is run again on the same Learner: all of `fine_tune`, or the second fit alone where that is the cell"
    def interrupted(make, fit, name):
        path = tmp_path/f'{name}.pth'
        set_seed(0)
        learn = make()
        if learner_wide: learn.add_cb(Resume(path))
        cbs = lambda *more: [*more, *([] if learner_wide else [Resume(path)])]
        with pytest.raises(KeyboardInterrupt): fit(learn, cbs(DieIn(1, 6)))
        return learn, cbs()
    learn, cbs = interrupted(groups(base), tuned, 'tuned')
    tuned(learn, cbs)
    assert differ(end(learn), end(run(groups(base), tuned))) == []
    if not learner_wide: return
    learn, cbs = interrupted(base, twice, 'twice')
    learn.fit(2, .01)
    assert differ(end(learn), end(run(base, twice))) == []

def test_another_second_fit(base, tmp_path):
    "Refused by what differs, in which fit; and so is a first one"
    path = tmp_path/'run.pth'
    run(groups(base), tuned, [Resume(path), DieIn(1, 6)], dies=True)
    file = path.read_bytes()
    with pytest.raises(ValueError, match=r'another training run \(fit 2: (optimiser|callbacks)'):
        run(groups(base), lambda l, cbs: l.fine_tune(2, .01, div=7., cbs=cbs), [Resume(path)])
    with pytest.raises(ValueError, match=r'another training run \(fit 1: n_epoch is 1 in the file and 2 here'):
        run(groups(base), lambda l, cbs: l.fine_tune(2, .01, freeze_epochs=2, cbs=cbs), [Resume(path)])
    assert path.read_bytes() == file
    learn = run(lambda **kw: base(**kw).add_cb(Resume(tmp_path/'b.pth')), twice)
    run(base, fits['fit'], [Resume(tmp_path/'b2.pth'), Die(6)], dies=True)
    (tmp_path/'b2.pth').rename(tmp_path/'b.pth')
    with pytest.raises(ValueError, match="does not contain this Learner's earlier"): learn.fit(1)

@pytest.mark.parametrize('stops', ['epoch', 'first epoch', 'batch'])
def test_a_fit_that_a_callback_stops(stops, base, tmp_path):
    """As early stopping does: a further fit goes on from where it stopped, and so it does after a kill; the same fit
    alone goes on from what was kept"""
    from fastai.vision.all import CancelFitException
    class Stops(Callback):
        order = 60
        def before_fit(self): self.at = dict(epoch=8, batch=6).get(stops, 4) if not hasattr(self, 'at') else None
        def _stop(self):
            if self.learn.train_iter == self.at and not self.learn.lock.locked(): raise CancelFitException
        def after_batch(self): self._stop() if self.training and stops == 'batch' else None
        def after_epoch(self): self._stop() if stops != 'batch' else None
    make = lambda **kw: base(**kw, cbs=[Stops(), WeightAveraging(.9)])
    def fit(learn, cbs=()): learn.fit(3, .01, cbs=cbs); learn.fit(2, .01, cbs=cbs)
    want = end(run(make, fit))
    assert differ(end(run(make, fit, [Resume(tmp_path/'a.pth')])), want) == []
    (tmp_path/'b').mkdir()
    cuts = [(1, 2), (1, 6)] if stops != 'first epoch' else [(1, 6), (1, 8, 'after_fit')]
    assert differ(end(until_killed(make, fit, tmp_path/'b', cuts)), want) == []
    one = lambda learn, cbs=(): learn.fit(3, .01, cbs=cbs)
    run(make, one, [Resume(tmp_path/'c.pth')])
    again = run(lambda **kw: base(**kw, cbs=[Stops(), WeightAveraging(.9)]), one, [Resume(tmp_path/'c.pth')],
                seed=0 if stops == 'first epoch' else 9)
    assert again.train_iter == dict(epoch=8, batch=6).get(stops, 4)

def test_epochs_and_best_ones_of_resumed_fits(base, tmp_path, capsys):
    """`KeepEpochs` counts on and keeps each epoch once, `RobustOverfitting` puts back the best of a fit that is not
    trained again, the log goes on"""
    from fastai.vision.all import ValueMetric
    scores, logs = dict(zip(range(1, 5), [.5, .3, .4, .6])), []
    def made(folder):
        def make(**kw):
            for log in logs: log.file.close() # which fastai forgets in an interrupted fit
            learn = base(**kw, path=tmp_path/folder,
                         cbs=[KeepEpochs(), RobustOverfitting(restore=True), CSVLogger(append=True)])
            learn.metrics = [accuracy,
                             ValueMetric(lambda: scores[learn.keep_epochs.epochs_done + 1], 'robust_accuracy')]
            logs.append(learn.csv_logger)
            return learn
        return make
    for k in 'ab': (tmp_path/k).mkdir()
    want = end(run(made('a'), twice))
    got = end(until_killed(made('b'), twice, tmp_path, [(0, 6), (1, 2), (1, 6), (1, 8, 'after_fit')]))
    assert differ(got, want) == []
    for n in (1, 2, 3, 4):
        assert bits(torch.load(tmp_path/f'a/models/epoch_{n}.pth')) == bits(
            torch.load(tmp_path/f'b/models/epoch_{n}.pth'))
    read = lambda k: [l.rpartition(',')[0] for l in (tmp_path/k/'history.csv').read_text().splitlines()]
    assert (len({read_card(tmp_path/f'b/models/epoch_{n}.json')['training'] for n in (1, 2, 3, 4)}) == 1
            and read('a') == read('b'))

def test_a_file_of_an_earlier_version(base, tmp_path):
    path = tmp_path/'run.pth'
    want = end(run(base, one_cycle))
    run(base, one_cycle, [Resume(path), Die(6)], dies=True)
    s = load_plain(path)
    torch.save({k: v for k,v in s.items() if k not in ('ended','stopped')}, path)
    assert differ(end(run(base, one_cycle, [Resume(path)], seed=9, net=5)), want) == []
    for bad in (dict(ended=3), dict(ended=[3]), dict(ended=[{}]), dict(stopped={})):
        torch.save(s | bad, path)
        with pytest.raises(ValueError, match='is damaged'): run(base, one_cycle, [Resume(path)])

def test_a_phase_of_no_epochs(base, tmp_path, capsys):
    "There is nothing of it to keep"
    def fit(learn, cbs=()): learn.fine_tune(2, .01, freeze_epochs=0, cbs=cbs)
    want = end(run(groups(base), fit))
    assert (differ(end(until_killed(groups(base), fit, tmp_path, [(1, 6)])), want) == []
            and capsys.readouterr().out == '')


# --- before and after ---

def test_finished_is_finished(base, make_dls, tmp_path, capsys):
    "A fit that is done trains nothing and leaves the weights, by the same Learner and by another"
    make = lambda **kw: base(**kw, cbs=[WeightAveraging(.9), GradientClip(.1)])
    learn = run(make, one_cycle, [Resume(tmp_path/'run.pth', 3)])
    want = end(learn)
    where = Where()
    assert 'left to train' not in capsys.readouterr().out
    one_cycle(learn, [Resume(tmp_path/'run.pth'), where])
    assert differ(end(learn), want) == [] and where.seen == []
    assert f'`{tmp_path/"run.pth"}` contains all 3 epochs: nothing is left to train' in capsys.readouterr().out
    other = run(make, one_cycle, [Resume(tmp_path/'run.pth'), where], seed=9, net=5)
    assert differ(end(other), want) == [] and where.seen == [] and other.epoch == 2

@pytest.mark.parametrize('how', ['finished', 'interrupted', 'interrupted at once'])
def test_another_fit_afterwards(how, base, make_dls, tmp_path):
    """As if `Resume` had never been there: every batch of every epoch, counted from 0, though the traceback keeps
    all frames"""
    path = tmp_path/'run.pth'
    run(base, one_cycle, [Resume(path, 1), Die(6)], dies=True)
    learn = base(net=5)
    if how == 'finished': one_cycle(learn, Resume(path))
    else:
        with pytest.raises(KeyboardInterrupt) as _kept: # its traceback keeps the frames
            one_cycle(learn, [Resume(path, 1), Die(7 if how == 'interrupted' else 6,
                                                   'after_batch' if how == 'interrupted' else 'before_train')])
    other = base()
    for l in (learn, other):
        l.model.load_state_dict(base(net=3).model.state_dict())
        l.create_opt()
        l.model.zero_grad()
        l.dls.train.rng.setstate(random.Random(3).getstate())
        for p in l.model.parameters(): p.grad = None
    ends = []
    for l in (learn, other):
        set_seed(3)
        where = Where()
        l.fit(2, .01, cbs=where)
        l.recorder.hps = {} # of the fit before
        ends.append((end(l), where.seen, [type(cb).__name__ for cb in l.cbs]))
    assert ends[0][1:] == ends[1][1:] and differ(ends[0][0], ends[1][0]) == []
    assert [e for e,*_ in ends[0][1]] == [0]*4 + [1]*4

@pytest.mark.parametrize('event', ['after_batch', 'before_train'])
def test_loaders_are_put_back(event, base, tmp_path):
    "Copies of the training loader, as `get_preds` and `export` make them, of a resumed fit that was interrupted too"
    path = tmp_path/'run.pth'
    run(base, one_cycle, [Resume(path, 1), Die(6)], dies=True)
    learn = base(net=5)
    own = {k: v for k,v in vars(learn.dls.train).items() if callable(v)}
    with pytest.raises(KeyboardInterrupt) as _kept: # its traceback keeps the frames
        one_cycle(learn, [Resume(path, 1), Die(7, event)] if event == 'after_batch'
                  else [Resume(path, 1), Die(6, event)])
    if event == 'before_train': learn.fit(1, .01)
    assert {k: v for k,v in vars(learn.dls.train).items() if callable(v)} == own
    assert len(learn.get_preds(ds_idx=0)[0]) == 128

def test_nothing_is_left(base, tmp_path, open_files):
    "No state in memory, no open file, no callback, no temporary file"
    resume = Resume(tmp_path/'run.pth', 3)
    before = open_files()
    run(base, one_cycle, [resume, Die(7)], dies=True)
    learn = run(base, one_cycle, [resume], net=5)
    n_cbs = len(base().cbs)
    assert len(learn.cbs) == n_cbs and not any('_from_epoch' in k or 'resume' in k for k in vars(learn))
    one_cycle(learn, resume) # finished
    assert not open_files() - before
    held = pickle.dumps({k: v for k,v in vars(resume).items() if k not in ('learn','training')})
    assert len(held) < 60_000 and sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ['run.pth']
    alive = [weakref.ref(learn), weakref.ref(learn.model)]
    del learn; gc.collect()
    assert [r() for r in alive] == [None, None]

@pytest.mark.parametrize('how', ['fresh', 'finished', 'interrupted'])
def test_export(how, base, tmp_path):
    """With a `Resume` that stays, before a fit, after one and after an interrupted one that went on in the middle of
    an epoch"""
    path = tmp_path/'run.pth'
    if how != 'fresh': run(base, one_cycle, [Resume(path, 1), Die(6)], dies=True)
    learn = base(cbs=Resume(path, 1), loss_func=CrossEntropyLossFlat())
    if how == 'finished': one_cycle(learn)
    if how == 'interrupted':
        with pytest.raises(KeyboardInterrupt): one_cycle(learn, Die(7))
    learn.export('all.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'all.pkl')
    item = learn.dls.valid_ds[0][0]
    assert torch.equal(learn.predict(item)[2], loaded.predict(item)[2])

@pytest.mark.parametrize('every,step', [(None, 6), (3, 7)])
def test_with_a_progress_bar(every, step, base, tmp_path, capsys):
    "As users see it: a line for each epoch under its own number, no error, no warning"
    def make(**kw):
        learn = base(**kw)
        learn.logger = print
        return learn.add_cb(ProgressCallback())
    def lines():
        return [[s for s in l.split()[:-1]] for l in capsys.readouterr().out.replace('\r', '\n').splitlines()
                if l[:1].isdigit() and '%' not in l]
    run(make, one_cycle)
    whole = lines()
    run(make, one_cycle, [Resume(tmp_path/'run.pth', every), Die(step)], dies=True)
    assert lines() == whole[:1]
    learn = run(make, one_cycle, [Resume(tmp_path/'run.pth')], net=5)
    assert lines() == whole[1:] and learn.logger is print
    one_cycle(learn, Resume(tmp_path/'run.pth')) # finished
    assert lines() == [] and learn.logger is print


# --- refused ---

def teacher_akd(eps=.1, alpha=.8, change=False):
    def make(net):
        if change: net[5].weight.data[0,0] += 1e-6
        return AKDCallback(net, alpha=alpha, attack=PGD(eps, steps=1))
    return make
others = dict(
    n_epoch = ('n_epoch is 3 in the file and 4 here', lambda l, cbs: l.fit_one_cycle(4, .01, cbs=cbs), {}),
    lr = ('lr', lambda l, cbs: l.fit_one_cycle(3, .02, cbs=cbs), {}),
    lr_of_one_group = ('lr', lambda l, cbs: l.fit_one_cycle(3, slice(.005, .01), cbs=cbs),
                       dict(splitter=lambda: lambda m: [params(m[:3]), params(m[3:])])),
    pct_start = ('lr', lambda l, cbs: l.fit_one_cycle(3, .01, pct_start=.26, cbs=cbs), {}),
    bs = ('bs|batches', one_cycle, dict(dls=lambda make: make(n=128, bs=31, batch_tfms=[PadCropFlip(1)]))),
    data = ('images', one_cycle, dict(
        dls=lambda make: with_subset(make(n=160, batch_tfms=[PadCropFlip(1)]), 128, seed=1))),
    channels = ('images|network', one_cycle, dict(
        dls=lambda make: make(n=128, channels=3, batch_tfms=[PadCropFlip(1)]), model=lambda net: net(n_in=3))),
    synthetic = ('', one_cycle, dict(
        dls=lambda make: with_synthetic(make(n=128, batch_tfms=[PadCropFlip(1)]), (Mixed.x, Mixed.y), .5))),
    network = ('network', one_cycle, dict(model=lambda net: net(bn=False))),
    frozen = ('', one_cycle, dict(freeze=True)),
    eps = ('akd.*eps=', one_cycle, dict(teacher=lambda: teacher_akd(eps=.11))),
    alpha = ('akd.*alpha is 0.8 in the file and 0.7 here', one_cycle, dict(teacher=lambda: teacher_akd(alpha=.7))),
    teacher = ('akd.*teacher', one_cycle, dict(teacher=lambda: teacher_akd(change=True))),
    metrics = ('metrics', one_cycle, dict(metrics=lambda: [accuracy, RobustAccuracy(attack, n=8)])),
    wd = ('wd', one_cycle, dict(wd=lambda: .2)),
    loss = ('loss', one_cycle, dict(loss_func=lambda: CrossEntropyLossFlat(label_smoothing=.1))),
    class_weights = ('loss', one_cycle, dict(loss_func=lambda: CrossEntropyLossFlat(weight=torch.arange(10.)))),
    optimiser = ('optimiser', one_cycle, dict(opt_func=lambda: SGD)),
    one_more = ('weight_averaging', one_cycle, dict(cbs=lambda: [MixUp(.4), GradientClip(.1), WeightAveraging()])),
    one_less = ('gradient_clip', one_cycle, dict(cbs=lambda: [MixUp(.4)])),
    setting = ('gradient_clip.max_norm', one_cycle, dict(cbs=lambda: [MixUp(.4), GradientClip(.2)])),
    mixup = ('mix_up', one_cycle, dict(cbs=lambda: [MixUp(.8), GradientClip(.1)])),
    augmentation = ('transforms', one_cycle, dict(
        dls=lambda make: make(n=128, batch_tfms=[PadCropFlip(1), Cutout(2)]))),
    how_much = ('transforms', one_cycle, dict(dls=lambda make: make(n=128, batch_tfms=[PadCropFlip(2)]))),
    normalisation = ('transforms', one_cycle, dict(
        dls=lambda make: make(n=128, batch_tfms=[PadCropFlip(1)], stats=([.3], [.25])))))

@pytest.fixture
def refused(base, make_dls, tiny_net):
    "Factory of Learners that differ from a standard one as told"
    def make(net=0, freeze=False, **other):
        std = dict(dls=lambda make: make(n=128, batch_tfms=[PadCropFlip(1)]), teacher=teacher_akd,
                   cbs=lambda: [MixUp(.4), GradientClip(.1)],
                   splitter=lambda: lambda m: [params(m[:3]), params(m[3:])]) | other
        args = {k: v(make_dls) if k == 'dls' else v(tiny_net) if k == 'model' else v() for k,v in std.items()}
        learn = base(net=net, **args)
        if freeze: learn.freeze()
        return learn
    return make

@pytest.mark.parametrize('other', others)
def test_another_training(other, refused, tmp_path):
    "Refused by what differs, and the Learner, the random numbers and the file stay as they are"
    words, fit, kwargs = others[other]
    if 'teacher' in kwargs: words = words.replace('akd.*', 'akd')
    path = tmp_path/'run.pth'
    run(refused, one_cycle, [Resume(path, 1), Die(6)], dies=True)
    file = path.read_bytes()
    learn = refused(net=5, **kwargs)
    learn.create_opt() if not kwargs.get('freeze') else None
    before, opt = weights(learn), bits(learn.opt.state_dict()['state'])
    set_seed(4)
    rng = random.getstate(), bits(torch.tensor(np.random.get_state()[1])), bits(torch.get_rng_state())
    with pytest.raises(ValueError, match='another training run') as e: fit(learn, Resume(path))
    assert str(path) in str(e.value)
    for w in words.split('|') if '|' not in words else []: assert w.replace('akd', '') in str(e.value)
    if '|' in words: assert any(w in str(e.value) for w in words.split('|'))
    assert (weights(learn) == before and bits(learn.opt.state_dict()['state']) == opt
            and learn.n_epoch == (4 if other == 'n_epoch' else 3))
    assert (rng == (random.getstate(), bits(torch.tensor(np.random.get_state()[1])), bits(torch.get_rng_state()))
            and path.read_bytes() == file)
    assert not any(type(cb).__name__ in ('Resume', '_FromEpoch') for cb in learn.cbs) and len(str(e.value)) < 1500

def test_another_rate_without_a_schedule(base, tmp_path):
    "The learning rate of `fit` is part of the run"
    run(base, fits['fit'], [Resume(tmp_path/'run.pth'), Die(6)], dies=True)
    with pytest.raises(ValueError, match=r'lr.* is 0\.01 in the file and 0\.02 here'):
        base().fit(3, .02, cbs=Resume(tmp_path/'run.pth'))

def test_another_schedule_between(base, tmp_path):
    "Steps at other epochs, however close"
    fit = lambda at: lambda l, cbs: l.fit_sched(20, .01, Steps(at, 20), cbs=cbs)
    run(base, fit((11,)), [Resume(tmp_path/'run.pth'), Die(6)], dies=True)
    with pytest.raises(ValueError, match='lr'): run(base, fit((12,)), [Resume(tmp_path/'run.pth')])

def test_other_synthetic_images(base, make_dls, tmp_path):
    "More of them in a batch, or others"
    make = lambda x, frac: lambda **kw: base(**kw, dls=with_synthetic(make_dls(n=128), (x, Mixed.y), frac))
    run(make(Mixed.x, .5), one_cycle, [Resume(tmp_path/'run.pth'), Die(6)], dies=True)
    for x,frac,words in ((Mixed.x, .25, 'synthetic is 0.5 in the file and 0.25 here'), (255-Mixed.x, .5, 'images')):
        with pytest.raises(ValueError, match=words): run(make(x, frac), one_cycle, [Resume(tmp_path/'run.pth')])

def test_what_only_shows_may_change(base, tmp_path):
    "The log that was not there before begins now"
    run(base, one_cycle, [Resume(tmp_path/'run.pth'), Die(6)], dies=True)
    learn = base(net=5, cbs=KeepEpochs())
    learn.add_cb(ProgressCallback())
    with learn.no_bar(): one_cycle(learn, [Resume(tmp_path/'run.pth', every=1), CSVLogger()])
    assert (weights(learn) == weights(run(base, one_cycle))
            and (tmp_path/'history.csv').read_text().startswith('epoch,train_loss'))

@pytest.mark.parametrize('every', [0, -1])
def test_every_must_be_positive(every):
    with pytest.raises(ValueError, match='`every`'): Resume('run.pth', every)


# --- bad files and full disks ---

class Runs:
    def __reduce__(self): return os.system, (f'touch {os.environ["RKD_MARKER"]}',)
@pytest.mark.parametrize('bad', ['empty', 'short', 'half', 'long', 'random', 'pickle', 'hidden', 'weights', 'list',
                                 'folder', 'text', 'flipped'])
def test_bad_files(bad, base, tmp_path, monkeypatch):
    "A clear error that names the file; nothing in it is executed, and the Learner stays as it is"
    path, marker = tmp_path/'run.pth', tmp_path/'executed'
    monkeypatch.setenv('RKD_MARKER', str(marker))
    run(base, one_cycle, [Resume(path, 1), Die(6)], dies=True)
    data = path.read_bytes()
    cut = dict(empty=0, short=100, half=len(data)//2, long=len(data)-1)
    if bad in cut: path.write_bytes(data[:cut[bad]])
    elif bad == 'random': path.write_bytes(np.random.default_rng(0).bytes(len(data)))
    elif bad == 'pickle': path.write_bytes(pickle.dumps(Runs()))
    elif bad == 'hidden': torch.save(torch.load(path, weights_only=False) | dict(csv=Runs()), path)
    elif bad == 'weights': torch.save(base().model.state_dict(), path)
    elif bad == 'list': torch.save([1, 2], path)
    elif bad == 'text': path.write_text('hello')
    elif bad == 'flipped': # one bit of one weight
        i = data.index(next(iter(load_plain(path)['model'].values())).numpy().tobytes())
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i+1:])
    else: path.unlink(); path.mkdir()
    learn = base(net=5)
    before = weights(learn)
    with pytest.raises(ValueError) as e: one_cycle(learn, Resume(path))
    assert str(path) in str(e.value) and weights(learn) == before and not marker.exists() and learn.n_epoch == 3

class FullDisk:
    "In place of `torch.save`: from the `n`-th call on, half the file and an error"
    def __init__(self, n, error): self.n, self.error, self.save = n, error, torch.save
    def __call__(self, obj, f, *args, **kwargs):
        self.n -= 1
        self.save(obj, f, *args, **kwargs)
        if self.n >= 0: return
        f.write_bytes(f.read_bytes()[:f.stat().st_size//2])
        raise self.error
@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'),
                                   RuntimeError('[enforce fail at inline_container.cc:603] . PytorchStreamWriter '
                                                'failed writing file data/1: file write failed')])
def test_full_disk(error, base, tmp_path, monkeypatch):
    "One error that names the file and says why; the file of before is whole, and with it the training goes on"
    path = tmp_path/'run.pth'
    whole = end(run(base, one_cycle))
    monkeypatch.setattr(torch, 'save', FullDisk(5, error))
    set_seed(0)
    with pytest.raises(OSError) as e: one_cycle(base(), Resume(path, 1))
    assert str(path) in str(e.value) and str(error) in str(e.value)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ['run.pth'] and load_plain(path)['epoch'] == 1
    assert differ(end(run(base, one_cycle, [Resume(path)], seed=9, net=5)), whole) == []

def test_a_folder_that_cannot_be_written(base, tmp_path):
    "Said before the first epoch, not after it"
    (tmp_path/'file').write_text('')
    learn = base()
    before = weights(learn)
    with pytest.raises(OSError) as e: one_cycle(learn, Resume(tmp_path/'file'/'run.pth'))
    assert str(tmp_path/'file') in str(e.value) and weights(learn) == before

def test_its_folder_is_made(base, tmp_path):
    run(base, one_cycle, [Resume(tmp_path/'a'/'b'/'run.pth')])
    assert [p.name for p in (tmp_path/'a'/'b').iterdir()] == ['run.pth']


# --- real kills ---

script = '''
import os, random, signal, sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
from fastai.vision.all import Callback, CrossEntropyLossFlat, Learner, ProgressCallback, accuracy, set_seed
from rkd_fastai.all import *
import torch.nn as nn

how, path, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
save, pipe = torch.save, None

def tell(what):
    if pipe is not None: os.write(pipe, what)
class Tell(Callback):
    order, only_shows = 3000, True
    def after_batch(self):
        if self.training: tell(b's')
def in_two_parts(o, f):
    "A write that lasts: half of the file is there when this is told"
    save(o, f)
    data = f.read_bytes()
    f.write_bytes(data[:len(data)//2]); tell(b'w'); time.sleep(.05 if pipe else 0.); f.write_bytes(data)

def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.2), nn.Flatten(),
                         nn.Linear(8*16, 10))
def train():
    seed = os.getpid() if how != 'whole' and path.exists() else 0 # a run that goes on owes nothing to the seed
    teacher, student = net(7), net(seed)
    set_seed(seed)
    learn = Learner(digits_dls(bs=128, batch_tfms=[PadCropFlip(1)]), student, loss_func=CrossEntropyLossFlat(),
                    metrics=accuracy,
                    cbs=[AKDCallback(teacher, attack=PGD(.1, steps=2)), WeightAveraging(.9), Tell()])
    learn.remove_cb(ProgressCallback); learn.logger = lambda *_: None
    torch.save = in_two_parts
    learn.fit_one_cycle(16, .01, cbs=None if how == 'whole' else Resume(path, every=2))
    torch.save, rec = save, learn.recorder
    save([learn.model.state_dict(), [float(v) for v in rec.lrs], [float(v) for v in rec.losses],
          [list(v) for v in rec.values], torch.get_rng_state()], out.with_suffix('.part'))
    out.with_suffix('.part').rename(out)

def kill(when):
    "Fork, and kill the child `when`: after so many steps and a moment, or in the middle of its so manieth write"
    global pipe
    event, n, moment = when
    reads, writes = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reads); pipe = writes
        try: train()
        finally: os._exit(0)
    os.close(writes)
    while n:
        told = os.read(reads, 1)
        if not told: raise RuntimeError('the child ended')
        n -= told == event
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(reads)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

if how == 'kills':
    rng, at, tmps = random.Random(int(sys.argv[4])), [], set()
    for i in range(24):
        kill((b'w', rng.randint(1, 3), rng.random()*.02) if i % 3 == 0 else (b's', rng.randint(1, 6), rng.random()*.03))
        s = torch.load(path, weights_only=False)
        at.append((s['epoch'], s['done'])) # whole, after each of them
        tmps |= set(path.parent.glob(f'.{path.name}.*.tmp'))
    print(at, len(tmps))
    assert at == sorted(at) and at[-1] > at[0] and len({d for e,d in at}) > 2 and len(tmps) >= 4, (at, tmps)
else: train()
'''

@pytest.mark.slow
def test_sigkill(tmp_path):
    "26 kills, 8 of them in the middle of a write, and four processes: the same bits as one process that nobody killed"
    (tmp_path/'script.py').write_text(script)
    (tmp_path/'run').mkdir()
    path, outs = tmp_path/'run'/'run.pth', {k: tmp_path/f'{k}.pt' for k in ('whole','killed')}
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    start = lambda how, out='killed', *args: subprocess.Popen(
        [sys.executable, str(tmp_path/'script.py'), how, str(path), str(outs[out]), *args], env=env)
    def wait(p): assert p.wait(300) == 0
    whole = start('whole', 'whole')
    for _ in range(2): # processes that live until there is a file, and until it is another one
        p, was = start('train'), path.stat().st_mtime_ns if path.exists() else 0
        while not (path.exists() and path.stat().st_mtime_ns > was): assert p.poll() is None; time.sleep(.01)
        p.send_signal(signal.SIGKILL)
        assert p.wait(60) == -signal.SIGKILL
    wait(start('kills', 'killed', str(random.randrange(1000))))
    assert not outs['killed'].exists()
    wait(start('train')); wait(whole)
    whole, killed = (torch.load(outs[k], weights_only=False) for k in ('whole','killed'))
    assert bits(killed) == bits(whole)


# --- the optimiser's state ---

def test_where_pytorchs_optimiser_keeps_its_state(base, tmp_path, monkeypatch):
    "It is left to PyTorch: Adam's step count stays on the CPU, where no step waits for it"
    adam = functools.partial(OptimWrapper, opt=torch.optim.Adam)
    run(lambda **k: base(**k, opt_func=adam), one_cycle, [Resume(tmp_path/'r.pth'), Die(6)], dies=True)
    given = []
    monkeypatch.setattr(OptimWrapper, 'load_state_dict',
                        lambda self, s: (given.append(s), self.opt.load_state_dict(s))[1], raising=False)
    monkeypatch.setattr('rkd_fastai.callback.resume.model_device', lambda model: torch.device('meta'))
    run(lambda **k: base(**k, opt_func=adam), one_cycle, [Resume(tmp_path/'r.pth')])
    assert {s['step'].device.type for s in given[0]['state'].values()} == {'cpu'}

def test_half_files_of_a_path_with_brackets(base, tmp_path):
    half = tmp_path/'.run[1].pth.7.tmp'
    half.write_bytes(b'half')
    run(base, one_cycle, [Resume(tmp_path/'run[1].pth')])
    assert not half.exists()
