"""The training methods inside fastai's loop: what is trained on, what is left alone, and how they sit beside
fastai's own callbacks."""
import copy, json, math, random, re
from functools import partial

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.callback.fp16 import AMPMode
from fastai.optimizer import Adam, Lamb, Lookahead, OptimWrapper, RMSProp, SGD, ranger
from fastai.vision.all import (BCEWithLogitsLossFlat, Callback, CancelEpochException, CancelFitException,
                               CancelStepException, CancelTrainException, CrossEntropyLossFlat, CutMix,
                               DataLoaders, FocalLossFlat, GradientAccumulation, L,
                               LabelSmoothingCrossEntropyFlat, Learner, LRFinder, MixedPrecision, MixUp, accuracy,
                               imagenet_stats, load_learner)

from rkd_fastai.all import *
from rkd_fastai.callback.adversarial import RobustCallback
from rkd_fastai.data.images import pixel_data

PLAIN_STATS = ([.3], [.25])
def make_cb(name, teacher, attack=None, **kw):
    attack = attack or PGD(.1, steps=2)
    against_teacher = PGD(**{k: v for k,v in attack.settings.items() if k != 'objective'}, objective='kl')
    return dict(at=lambda: AdversarialTraining(attack), trades=lambda: TRADES(PGD(.1, steps=2, objective='kl')),
                akd=lambda: AKDCallback(teacher, attack=attack, **kw),
                rslad=lambda: RSLADCallback(teacher, attack=attack, **kw),
                ard=lambda: ARDCallback(teacher, attack=attack, **kw), ckd=lambda: CKDCallback(teacher, **kw),
                adaad=lambda: AdaADCallback(teacher, .8, .6, against_teacher, **kw))[name]()
methods = ['at', 'trades', 'akd', 'rslad', 'ard', 'ckd', 'adaad']
each = pytest.mark.parametrize('name', methods)
distilled = pytest.mark.parametrize('name', ['akd', 'rslad', 'ard', 'ckd', 'adaad'])

class Spy(Callback):
    """What each training batch looks like to the model, before robust callbacks (order 4) and when the loss is known
    (order 50)"""
    order, run_valid = 50, False
    def __init__(self): self.xb,self.pred,self.yb,self.losses,self.x = [],[],[],[],[]
    def before_batch(self): self.xb.append(self.learn.xb[0].detach().clone())
    def after_loss(self):
        self.pred.append(self.learn.pred.detach().clone())
        self.yb.append(self.learn.yb[0].clone())
        self.losses.append(self.learn.loss.item())
class Clean(Callback):
    order, run_valid = 4, False
    def __init__(self): self.xb = []
    def before_batch(self): self.xb.append(self.learn.xb[0].detach().clone())
class Stop(Callback):
    "Raises `error` at the first `event` of the second batch"
    order = 60
    def __init__(self, event, error):
        self.n = 0
        def raises():
            self.n += 1
            if self.n == 2: raise error('stopped')
        setattr(self, event, raises)

def weights(model): return [p.detach().clone() for p in model.state_dict().values()]
def same(a, b): return all(torch.equal(p, q) for p,q in zip(a, b))
def close(a, b, **kw):
    for p,q in zip(a, b): torch.testing.assert_close(p, q, **kw)
def sgd_learner(make_learner, dls, model, **kw):
    "Plain SGD without weight decay or momentum, so that a step is the gradient"
    from fastai.vision.all import SGD
    return make_learner(dls, model, opt_func=SGD, wd=0., moms=(0.,0.,0.), **kw)


# --- every method through every way to fit ---

schedules = dict(
    one_cycle=lambda l: l.fit_one_cycle(1, .01),
    flat_cos=lambda l: l.fit_flat_cos(1, .01),
    lr_find=lambda l: l.lr_find(show_plot=False, num_it=5),
    fine_tune=lambda l: l.fine_tune(1, .01),
    exp=lambda l: l.fit_exp(1, .01),
    rkd=lambda l: l.fit_rkd(1, .01))

@each
@pytest.mark.parametrize('how', schedules)
@pytest.mark.filterwarnings('ignore:.*numpy.core is deprecated') # fastai's `learn.load`, which ends `lr_find`
def test_every_schedule(name, how, make_learner, make_dls, tiny_net):
    dls = make_dls(stats=PLAIN_STATS)
    learn = make_learner(dls, metrics=accuracy, cbs=make_cb(name, tiny_net(seed=7)))
    loss_func, before = learn.loss_func, weights(learn.model)
    spy = Spy(); learn.add_cb(spy)
    schedules[how](learn)
    log = learn.recorder.values[-1] if how != 'lr_find' else []
    assert spy.losses and all(math.isfinite(l) for l in spy.losses)
    assert learn.loss_func is loss_func
    if how != 'lr_find': # which puts the weights back
        assert not same(before, weights(learn.model))
        assert all(math.isfinite(v) for v in log)
    else: assert same(before, weights(learn.model))
    # validation is that of a Learner without us
    clean = make_learner(dls, learn.model, metrics=accuracy).validate()
    close([torch.tensor(learn.validate())], [torch.tensor(clean)], rtol=0, atol=0)
    if how in ('one_cycle', 'exp'): assert list(log[1:]) == pytest.approx(list(clean), abs=1e-6)

@each
def test_prediction_is_clean(name, make_learner, make_dls, tiny_net):
    dls = make_dls(stats=PLAIN_STATS)
    learn = make_learner(dls, cbs=make_cb(name, tiny_net(seed=7)))
    learn.fit(1)
    plain = make_learner(dls, learn.model)
    close(learn.get_preds(), plain.get_preds(), rtol=0, atol=0)
    item = dls.valid_ds[0][0]
    assert learn.predict(item)[0] == plain.predict(item)[0]

def test_fit_exp_and_fit_rkd_schedules(make_learner):
    class KeepLrs(Callback):
        run_valid = False
        def before_fit(self): self.used = []
        def before_step(self): self.used.append(self.opt.hypers[-1]['lr'])
    lrs = KeepLrs(); learn = make_learner(cbs=lrs) # 3 batches an epoch
    learn.fit_exp(4, lr_max=.1, decay=.5)
    assert lrs.used == pytest.approx([.1*.5**e for e in range(4) for _ in range(3)])
    learn.fit_rkd(4, lr_max=.2)
    top = max(lrs.used)
    assert .19 < top <= .2 and lrs.used[0] == pytest.approx(.2/25) and lrs.used[-1] < .02
    i = lrs.used.index(top)
    assert lrs.used == sorted(lrs.used[:i]) + sorted(lrs.used[i:], reverse=True)

def torch_opt(cls, **kw): return partial(OptimWrapper, opt=cls, **kw)

@pytest.mark.parametrize('opt_func, name', [
    (Adam, 'Adam'), (RMSProp, 'RMSProp'), (ranger, 'RAdam'), (Lamb, 'Lamb'), (torch_opt(torch.optim.AdamW), 'AdamW'),
    (SGD, None), (partial(SGD, mom=0.), None), (lambda params, lr, **kw: Lookahead(SGD(params, lr)), None),
    (sgd_nesterov, None), (torch_opt(torch.optim.SGD), None)])
def test_default_rates_are_for_sgd(opt_func, name, make_learner):
    """With another optimiser a fit that is given no rate says so before its first batch; a rate of one's own is
    taken in silence"""
    class Started(Callback):
        def before_fit(self): raise CancelFitException
    for fit,rate in (('fit_exp', .1), ('fit_rkd', .21)):
        learn = make_learner(opt_func=opt_func, cbs=Started())
        getattr(learn, fit)(1, lr_max=rate) # a warning is an error here
        if name is None: getattr(learn, fit)(1)
        else:
            with pytest.warns(UserWarning, match=(
                    rf"default `lr_max` {rate} is for SGD, but this Learner trains with {name}:"
                    rf".*{'lr_find' if name == 'Lamb' else '1e-2'}.*sgd_nesterov")) as messages:
                getattr(learn, fit)(1)
            assert messages[0].filename == __file__ # points at the line that fits
    learn.opt_func = sgd_nesterov
    learn.fit_rkd(1, reset_opt=True) # by the new optimiser, whatever was there

def test_methods_replace_each_other(make_learner, tiny_net):
    learn, teacher = make_learner(), tiny_net(seed=7)
    kinds = lambda: [type(cb) for cb in learn.cbs if isinstance(cb, RobustCallback)]
    for method,cls in dict(akd=AKDCallback, rslad=RSLADCallback, ard=ARDCallback, ckd=CKDCallback).items():
        assert learn.to_rkd(teacher, method=method) is learn and kinds() == [cls]
    assert learn.to_adversarial() is learn and kinds() == [AdversarialTraining]
    assert learn.to_adversarial(FGSM(.1)).adversarial_training.attack.eps == .1
    assert learn.to_natural() is learn and kinds() == []
    assert learn.to_rkd(teacher).to_natural().to_rkd(teacher, alpha=.3, T=2.) is learn and learn.cbs[-1].alpha == .3

def test_natural_after_robust_is_plain_fastai(make_learner, make_dls, tiny_net):
    def train(turn):
        learn = make_learner(make_dls(shuffle=False), tiny_net())
        turn(learn)
        learn.fit(1, .01)
        return weights(learn.model)
    close(train(lambda l: l.to_rkd(tiny_net(seed=7)).to_natural()), train(lambda l: l), rtol=0, atol=0)


# --- the equations, through `fit` ---

def two_teachers(tiny_net):
    """Two teachers with normalisations of their own, as modules with `mean` and `std` and as plain functions of
    pixel space"""
    a, b = tiny_net(seed=7).eval(), tiny_net(seed=8).eval()
    teacher = Teacher([Teacher(a, mean=[.5], std=[.5]), Teacher(b, mean=[.2], std=[.3])], betas=[.3, .7])
    return teacher, lambda x: (.3*a((x-.5)/.5).softmax(1) + .7*b((x-.2)/.3).softmax(1)).detach()

def pgd_by_hand(model, x, y, eps, steps):
    "Linf PGD from x: the model is left in eval mode"
    model.eval()
    x_adv = x.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        g, = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        x_adv = (x + (x_adv.detach() + eps/4*g.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    return x_adv

def by_hand(name, model, teacher, batches, norm, lr, eps=.1, steps=3, alpha=.8, lam=5/6):
    "One epoch in plain PyTorch, from the paper's Equations 5–7 and SGD"
    opt = torch.optim.SGD(model.parameters(), lr)
    kl = lambda z, target: (target*(target.clamp_min(1e-30).log() - z.log_softmax(1))).sum(1).mean()
    for x,y in batches:
        x_adv = pgd_by_hand(lambda_net(model, norm), x, y, eps, steps)
        onehot = torch.eye(10)[y]
        model.train()
        s_adv = model(norm(x_adv))
        if name == 'at': loss = F.cross_entropy(s_adv, y)
        elif name == 'akd': loss = F.cross_entropy(s_adv, alpha*teacher(x_adv) + (1-alpha)*onehot)
        elif name == 'ckd':
            s = model(norm(x))
            loss = .1*F.cross_entropy(s, y) + .9*kl(s, teacher(x))
        else:
            s, target = model(norm(x)), alpha*teacher(x) + (1-alpha)*onehot
            clean = F.cross_entropy(s, y) if name == 'ard' else kl(s, target)
            loss = (1-lam)*clean + lam*kl(s_adv, target)
        opt.zero_grad(); loss.backward(); opt.step()

class lambda_net(nn.Module):
    "`model` on pixel space"
    def __init__(self, model, norm): super().__init__(); self.model,self.norm = model,norm
    def forward(self, x): return self.model(self.norm(x))

@pytest.mark.parametrize('name', ['at', 'akd', 'rslad', 'ard', 'ckd'])
@pytest.mark.parametrize('n', [32, 96], ids=['one step', 'three steps'])
def test_fit_equals_a_plain_loop(name, n, make_learner, make_dls, tiny_net):
    dls = make_dls(n=n, stats=PLAIN_STATS, shuffle=False)
    teacher, teacher_probs = two_teachers(tiny_net)
    # without BatchNorm: with it, RSLAD's two forward passes may be taken in either order
    ours, theirs = tiny_net(bn=name in ('at', 'akd')), tiny_net(bn=name in ('at', 'akd'))
    learn = sgd_learner(make_learner, dls, ours, cbs=make_cb(name, teacher, PGD(.1, steps=3, random_start=False)))
    learn.fit(1, .1)
    plain = make_dls(n=n, shuffle=False) # the same images in pixel space
    batches = [(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for x,y in plain.train]
    assert len(batches) == n//32
    by_hand(name, theirs, teacher_probs, batches, lambda x: (x-.3)/.25, .1)
    close(weights(ours), weights(theirs), rtol=1e-4, atol=2e-6)
    assert max((p-q).abs().max() for p,q in zip(weights(ours), weights(tiny_net(bn=name in ('at', 'akd'))))) > 1e-3

def test_akd_with_alpha_0_is_adversarial_training(make_learner, make_dls, tiny_net):
    def train(cb):
        torch.manual_seed(3)
        learn = make_learner(make_dls(stats=PLAIN_STATS, shuffle=False), tiny_net(), cbs=cb)
        learn.fit_one_cycle(2, .01)
        return weights(learn.model), list(map(list, learn.recorder.values))
    (got, log), (want, log_at) = train(AKDCallback(tiny_net(seed=7), alpha=0.)), train(AdversarialTraining())
    close(got, want, rtol=0, atol=0)
    assert sum(log, []) == pytest.approx(sum(log_at, []), rel=1e-6) # a sum of the logged loss may round differently

def test_T_reaches_teacher_and_loss(make_learner, make_dls, tiny_net):
    dls, teacher = make_dls(n=32, shuffle=False), tiny_net(seed=7).eval()
    (x, y), s = next(iter(dls.train)), tiny_net(bn=False)
    x, y = x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)
    spy = Spy()
    sgd_learner(make_learner, dls, tiny_net(bn=False), cbs=[CKDCallback(teacher, lam=.7, T=4.), spy]).fit(1)
    with torch.no_grad():
        q = (teacher(x)/4).softmax(1)
        want = .3*F.cross_entropy(s(x), y) + .7*16*(q*(q.log() - (s(x)/4).log_softmax(1))).sum(1).mean()
    assert spy.losses[0] == pytest.approx(want.item(), rel=1e-5)


# --- pixel space ---

@pytest.mark.parametrize('name', ['at', 'trades', 'akd', 'rslad', 'ard'])
def test_epsilon_is_a_pixel_distance_in_every_channel(name, make_learner, make_dls, tiny_net):
    """ImageNet statistics differ by channel; after denormalising, the ball has radius 8/255 in each, and the range
    is [0, 1]"""
    dls = make_dls(channels=3, stats=imagenet_stats)
    teacher = Teacher(tiny_net(n_in=3, seed=7))
    cb = make_cb(name, teacher, PGD(steps=10)) if name != 'trades' else TRADES(PGD(steps=10, objective='kl'))
    clean, spy = Clean(), Spy()
    make_learner(dls, cbs=[cb, clean, spy]).fit(1)
    mean, std = (torch.tensor(o).view(1,3,1,1) for o in imagenet_stats)
    pixels = lambda xs: torch.cat([x.as_subclass(torch.Tensor) for x in xs])*std + mean
    x, x_adv = pixels(clean.xb), pixels(spy.xb)
    assert x_adv.min() >= -1e-5 and x_adv.max() <= 1 + 1e-5
    biggest = (x_adv-x).abs().amax((0,2,3))
    torch.testing.assert_close(biggest, torch.full((3,), 8/255), rtol=0, atol=1e-5)

def test_clean_distillation_leaves_the_images(make_learner, make_dls, tiny_net):
    clean, spy = Clean(), Spy()
    make_learner(make_dls(stats=PLAIN_STATS), cbs=[CKDCallback(tiny_net(seed=7)), clean, spy]).fit(1)
    close([x.as_subclass(torch.Tensor) for x in spy.xb], [x.as_subclass(torch.Tensor) for x in clean.xb],
          rtol=0, atol=1e-6)

def test_teacher_sees_its_own_space(make_learner, make_dls, tiny_net):
    "A Learner's normalisation is the teacher's, the student's DataLoaders have another"
    t_learn = make_learner(make_dls(stats=([.5], [.5])), tiny_net(seed=7))
    seen = []
    teacher = Teacher(t_learn)
    teacher.members[0].model.register_forward_hook(lambda m, inp, out: seen.append(inp[0]))
    spy = Spy()
    cb = AKDCallback(teacher, attack=PGD(.1, steps=1))
    learn = make_learner(make_dls(n=32, stats=PLAIN_STATS), cbs=[cb, spy]); learn.fit(1)
    x_adv = spy.xb[0]*.25 + .3
    torch.testing.assert_close(seen[-1], ((x_adv-.5)/.5), rtol=0, atol=1e-5)

@pytest.mark.parametrize('name', ['at', 'trades', 'akd', 'rslad', 'ard'])
def test_attack_leaves_batchnorm_to_training(name, make_learner, make_dls, tiny_net):
    "One update of the running statistics a training forward pass, none from the attack's"
    model = tiny_net()
    learn = make_learner(make_dls(), model, cbs=make_cb(name, tiny_net(seed=7), PGD(.1, steps=5)))
    calls = []
    model.register_forward_hook(lambda m, *_: calls.append(m[1].training))
    learn.fit(1)
    assert model[1].num_batches_tracked.item() == sum(calls) == 3*(2 if name in ('trades', 'rslad', 'ard') else 1)

def test_layers_that_fastai_keeps_frozen_stay_in_eval(make_learner, make_dls, tiny_net):
    model = tiny_net(dropout=.5)
    for p in model[1].parameters(): p.requires_grad_(False) # BatchNorm that does not train
    modes = []
    class Modes(Callback):
        def before_train(self): model[1].eval()
        def after_pred(self): modes.append((model[1].training, model[3].training))
        run_valid = False
    learn = make_learner(make_dls(), model, cbs=[AdversarialTraining(PGD(.1, steps=2)), Modes()])
    before = model[1].running_mean.clone()
    learn.fit(1)
    assert set(modes) == {(False, True)} and torch.equal(before, model[1].running_mean)
    assert not any(p.requires_grad for p in model[1].parameters())


# --- what metrics, recorder and loss function see ---

@each
def test_train_metrics_see_hard_labels(name, make_learner, make_dls, tiny_net):
    seen = []
    def spying_accuracy(pred, targ): seen.append(targ.clone()); return accuracy(pred, targ)
    learn = make_learner(make_dls(), metrics=[spying_accuracy], cbs=make_cb(name, tiny_net(seed=7)))
    learn.recorder.train_metrics = True
    learn.fit(1)
    assert len(seen) == 5 and all(t.ndim == 1 and t.dtype == torch.int64 for t in seen)
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'train_spying_accuracy', 'valid_loss',
                                           'valid_spying_accuracy', 'time']
    assert all(math.isfinite(v) for v in learn.recorder.values[0])

def test_robust_accuracy_beside_train_metrics(make_learner, make_dls, tiny_net):
    learn = make_learner(make_dls(), metrics=[accuracy, RobustAccuracy(PGD(.1, steps=2))],
                         cbs=make_cb('akd', tiny_net(seed=7)))
    learn.recorder.train_metrics = True
    learn.fit(2)
    assert all(0 <= v[-1] <= v[-2] + 1e-6 <= 1 for v in learn.recorder.values)

# --- what the Learner's loss says about labels ---

@distilled
@pytest.mark.parametrize('loss_func', [
    F.cross_entropy, lambda pred, y: F.cross_entropy(pred, y.as_subclass(torch.Tensor))**2], ids=['function', 'own'])
def test_own_loss_function_does_not_matter(name, loss_func, make_learner, make_dls, tiny_net):
    "The method's loss is trained on; the Learner's is left for validation"
    def train(loss_func):
        torch.manual_seed(3)
        learn = make_learner(make_dls(shuffle=False), tiny_net(), loss_func=loss_func,
                             cbs=make_cb(name, tiny_net(seed=7)))
        learn.fit(1, .01); assert learn.loss_func is loss_func
        return weights(learn.model)
    close(train(loss_func), train(CrossEntropyLossFlat()), rtol=0, atol=0)

class Targets(PGD):
    "Keeps what it is to move away from"
    def __call__(self, model, x, targ): self.seen.append(targ); return super().__call__(model, x, targ)
    seen = []

CLASS_WEIGHTS = torch.linspace(.2, 3, 10)
labelled = dict(smoothing=(LabelSmoothingCrossEntropyFlat(eps=.3), .3, None),
                torch_smoothing=(nn.CrossEntropyLoss(label_smoothing=.2), .2, None),
                weights=(CrossEntropyLossFlat(weight=CLASS_WEIGHTS), 0, CLASS_WEIGHTS),
                both=(nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=.2), .2, CLASS_WEIGHTS),
                function=(partial(F.cross_entropy, weight=CLASS_WEIGHTS, label_smoothing=.1), .1, CLASS_WEIGHTS))

@each
@pytest.mark.parametrize('kind,mix', [(k, m) for k in labelled for m in (None, MixUp)
                                      if not m or hasattr(labelled[k][0], 'y_int')]) # what MixUp asks a loss for
def test_smoothing_and_class_weights(name, kind, mix, make_learner, make_dls, tiny_net):
    """They reach the attack's target, the hard part of the soft target and the mean over the batch; the oracle
    writes them out"""
    loss_func, eps, w = labelled[kind]
    model, teacher, spy, clean, mixer = tiny_net(bn=False), tiny_net(seed=7).eval(), Spy(), Clean(), mix and mix(50.)
    attack = Targets(.1, steps=2); attack.seen = []
    learn = sgd_learner(make_learner, make_dls(n=32, shuffle=False), copy.deepcopy(model), loss_func=loss_func,
                        cbs=[make_cb(name, teacher, attack), clean, spy, *([mixer] if mix else [])])
    labels = []
    class Labels(Callback):
        order, run_valid = 1, False
        def before_batch(self):
            onehot = lambda y: F.one_hot(y.as_subclass(torch.Tensor), 10).float()
            y = onehot(self.learn.yb[0])
            labels.append(torch.lerp(onehot(mixer.yb1[0]), y, torch.as_tensor(mixer.lam).view(-1, 1)) if mix else y)
    learn.add_cb(Labels()).fit(1)
    assert learn.loss_func is loss_func
    y = (1-eps)*labels[0] + eps/10
    x, x_adv = clean.xb[0].as_subclass(torch.Tensor), spy.xb[0].as_subclass(torch.Tensor)
    with torch.no_grad():
        s, s_adv, t, t_adv = model(x), model(x_adv), teacher(x).softmax(1), teacher(x_adv).softmax(1)
        each_loss = dict(at=lambda: F.cross_entropy(s_adv, y, reduction='none'),
                         trades=lambda: trades_loss(s, s_adv, y, reduction='none'),
                         akd=lambda: akd_loss(s_adv, t_adv, y, .8, reduction='none'),
                         rslad=lambda: rslad_loss(s, s_adv, t, y, .8, reduction='none'),
                         ard=lambda: ard_loss(s, s_adv, t, y, .8, reduction='none'),
                         ckd=lambda: ckd_loss(s, t, y, reduction='none'),
                         adaad=lambda: adaad_loss(s, s_adv, t, t_adv, y, .8, .6, 'none'))[name]()
    if name != 'at': # adversarial training keeps the Learner's own
        w = torch.ones(10) if w is None else w
        assert spy.losses[0] == pytest.approx(((y@w)*each_loss).sum().item()/(y@w).sum().item(), rel=1e-4)
    if name in ('at', 'akd', 'rslad', 'ard'):
        got = attack.seen[0]
        torch.testing.assert_close(got if got.is_floating_point() else F.one_hot(got, 10).float(), y, rtol=0, atol=1e-6)

@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat(weight=CLASS_WEIGHTS),
                                       nn.CrossEntropyLoss(label_smoothing=.2),
                                       LabelSmoothingCrossEntropyFlat(eps=.3)], ids=['weights', 'torch', 'smoothing'])
def test_akd_with_alpha_0_trains_by_the_learners_loss(loss_func, make_learner, make_dls, tiny_net):
    def train(cb):
        torch.manual_seed(3)
        learn = sgd_learner(make_learner, make_dls(n=32, shuffle=False), tiny_net(), loss_func=loss_func, cbs=cb)
        learn.fit(1, .1)
        return weights(learn.model)
    attack = PGD(.1, steps=2)
    close(train(AKDCallback(tiny_net(seed=7), alpha=0., attack=attack)), train(AdversarialTraining(attack)),
          rtol=1e-4, atol=1e-5)

# PyTorch's own answer for each: the loss of `alpha=0` AKD⁺ is the cross-entropy of the images as they are attacked, and
# so is that of TRADES without its robust term
own_settings = dict(ignored=dict(ignore_index=3), ignored_and_weighted=dict(ignore_index=3, weight=CLASS_WEIGHTS),
                    summed=dict(reduction='sum'), all=dict(ignore_index=0, reduction='sum', weight=CLASS_WEIGHTS),
                    smoothed=dict(ignore_index=3, label_smoothing=.2, reduction='sum'))
made_by = dict(flat=CrossEntropyLossFlat, torch=nn.CrossEntropyLoss,
               function=lambda **kw: partial(F.cross_entropy, **kw))

@pytest.mark.parametrize('method', [
    lambda net, attack: AKDCallback(net, alpha=0., attack=attack), lambda net, attack: TRADES(attack, beta=0.),
    lambda net, attack: CKDCallback(net, lam=0.)], ids=['akd','trades','ckd'])
@pytest.mark.parametrize('kind', own_settings)
@pytest.mark.parametrize('make', made_by)
def test_settings_of_the_loss_are_honoured(make, kind, method, make_learner, make_dls, tiny_net):
    def train(cb):
        learn = sgd_learner(make_learner, make_dls(n=32, shuffle=False), tiny_net(bn=False),
                            loss_func=made_by[make](**own_settings[kind]), cbs=cb)
        learn.fit(1, .01)
        return [*weights(learn.model), learn.recorder.losses[0]]
    nothing = PGD(.1, steps=0, random_start=False)
    close(train(method(tiny_net(seed=7), nothing)), train(AdversarialTraining(nothing)), rtol=1e-4, atol=1e-5)

def test_a_label_outside_the_classes_may_be_ignored(make_learner, make_dls, tiny_net):
    "Such as -1 of an image that nobody has labelled: it changes nothing but BatchNorm, of which there is none here"
    class Unlabelled(Callback):
        order, run_valid = 1, False
        def before_batch(self):
            y = self.learn.yb[0].clone()
            y[:8] = -1
            self.learn.yb = (y,)
    class Fewer(Callback):
        order, run_valid = 1, False
        def before_batch(self): self.learn.xb, self.learn.yb = (self.learn.xb[0][8:],), (self.learn.yb[0][8:],)
    def train(*cbs):
        learn = sgd_learner(make_learner, make_dls(n=32, shuffle=False), tiny_net(bn=False),
                            loss_func=CrossEntropyLossFlat(ignore_index=-1), cbs=cbs)
        learn.fit(1, .01)
        return weights(learn.model)
    attack = PGD(.1, steps=1, random_start=False)
    for cb in (lambda: AKDCallback(tiny_net(seed=7), attack=attack), lambda: AdversarialTraining(attack)):
        close(train(cb(), Unlabelled()), train(cb(), Fewer()), rtol=1e-4, atol=1e-6)

class Weighs(nn.Module):
    "A loss of a user's own, with a setting that PyTorch's have"
    def __init__(self, **kw): super().__init__(); vars(self).update(kw)
    def forward(self, pred, y): return F.cross_entropy(pred, y)
lost = dict(none=(lambda: CrossEntropyLossFlat(reduction='none'), "`reduction='none'`"),
            none_of_a_function=(lambda: partial(F.cross_entropy, reduction='none'), "`reduction='none'`"),
            none_smoothed=(lambda: LabelSmoothingCrossEntropyFlat(reduction='none'), "`reduction='none'`"),
            axis=(lambda: CrossEntropyLossFlat(axis=0), '`axis=0`'),
            old=(lambda: partial(F.cross_entropy, size_average=False), '`size_average=False`'),
            bce=(lambda: BCEWithLogitsLossFlat(pos_weight=CLASS_WEIGHTS), '`pos_weight`'),
            bce_summed=(lambda: nn.BCEWithLogitsLoss(reduction='sum'), "`reduction='sum'`"),
            nll=(lambda: nn.NLLLoss(weight=CLASS_WEIGHTS), '`weight`'),
            nll_ignores=(lambda: nn.NLLLoss(ignore_index=2), '`ignore_index=2`'),
            own=(lambda: Weighs(smoothing=.1), '`smoothing=0.1`'),
            own_function=(lambda: partial(Weighs(), ignore_index=2), '`ignore_index=2`'))

@pytest.mark.parametrize('name', ['trades','akd'])
@pytest.mark.parametrize('kind', lost)
def test_settings_of_the_loss_that_would_be_lost(kind, name, make_learner, make_dls, tiny_net):
    make, says = lost[kind]
    learn = make_learner(make_dls(), tiny_net(), loss_func=make(), cbs=make_cb(name, tiny_net(seed=7)))
    before = weights(learn.model)
    with pytest.raises(ValueError, match=f'(?s){re.escape(says)} of the Learner.s loss function '
                                         'is ignored by.*AdversarialTraining'):
        learn.fit(1, .01)
    assert same(weights(learn.model), before)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixing_that_cannot_be(mix, make_learner, make_dls, tiny_net):
    """fastai mixes integer labels where the loss is not its own, and PyTorch does not: said before the first batch;
    nor has an image of two classes one to ignore"""
    for name,loss_func,says in (('at', nn.CrossEntropyLoss(), 'CrossEntropyLossFlat'),
                                ('akd', F.cross_entropy, 'CrossEntropyLossFlat'),
                                ('akd', CrossEntropyLossFlat(ignore_index=3), '`ignore_index`')):
        learn = make_learner(make_dls(), tiny_net(), loss_func=loss_func, cbs=[make_cb(name, tiny_net(seed=7)), mix()])
        with pytest.raises(ValueError, match=f'{says}'): learn.fit(1, .01)
        assert learn.loss_func is loss_func
    for loss_func in (nn.CrossEntropyLoss(), F.cross_entropy):
        with pytest.raises(RuntimeError):
            make_learner(make_dls(), tiny_net(), loss_func=loss_func, cbs=mix()).fit(1, .01) # plain fastai

@each
def test_focal_loss(name, make_learner, make_dls, tiny_net):
    "Its own business where the Learner's loss is trained on; refused, before anything is changed, where it is not"
    learn = make_learner(make_dls(), tiny_net(), loss_func=FocalLossFlat(), cbs=make_cb(name, tiny_net(seed=7)))
    before = weights(learn.model)
    if name == 'at': learn.fit(1, .01); return
    for kw in ({}, dict(cbs=MixUp())):
        with pytest.raises(ValueError, match='(?s)there is no focal loss.*AdversarialTraining'):
            learn.fit(1, .01, **kw)
    assert same(weights(learn.model), before)
    if name in ('akd', 'rslad', 'ard', 'ckd'):
        other = make_learner(make_dls(), tiny_net(), loss_func=FocalLossFlat())
        with pytest.raises(ValueError, match='focal loss'): other.to_rkd(tiny_net(seed=7), name)
        assert not [cb for cb in other.cbs if isinstance(cb, RobustCallback)]


# --- beside fastai's own callbacks ---

class Grads(Callback):
    "The gradients of each optimiser step"
    order, run_valid = 100, False
    def __init__(self): self.grads = []
    def before_step(self): self.grads.append([p.grad.clone() for p in self.learn.model.parameters()])

@each
@pytest.mark.parametrize('bn', ['frozen', 'none'])
def test_accumulated_gradients_equal_the_big_batch(name, bn, make_learner, make_dls, tiny_net):
    attack = PGD(.1, steps=2, random_start=False)
    def grads(bs, cbs):
        model = tiny_net(bn=bn == 'frozen')
        grads, eval_bn = Grads(), Callback(before_batch=lambda _: model[1].eval())
        cb = (make_cb(name, tiny_net(seed=7), attack) if name != 'trades'
              else TRADES(PGD(.1, steps=2, random_start=False, objective='ce')))
        sgd_learner(make_learner, make_dls(n=64, bs=bs, shuffle=False), model, cbs=[cb, grads, eval_bn, *cbs]).fit(1)
        return grads.grads
    small, big = grads(16, [GradientAccumulation(64)]), grads(64, [])
    small = [g for g in small[-1:]] # `before_step` of the batch that fills the count
    close(small[0], big[0], rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
@each
def test_mixup_and_cutmix(name, mix, make_learner, make_dls, tiny_net):
    "The loss takes the labels mixed as the images were; the oracle mixes them by hand"
    model, teacher = tiny_net(bn=False), tiny_net(seed=7).eval()
    dls = make_dls(n=32, shuffle=False)
    mixer, spy, clean = mix(50.), Spy(), Clean() # λ next to ½
    at = []
    class MixedLabels(Callback): # after MixUp (order 0) has drawn
        order, run_valid = 1, False
        def before_batch(self):
            lam = torch.as_tensor(mixer.lam).view(-1, 1)
            onehot = lambda y: F.one_hot(y.as_subclass(torch.Tensor), 10).float()
            at.append(lam*onehot(self.learn.yb[0]) + (1-lam)*onehot(mixer.yb1[0]))
    learn = sgd_learner(make_learner, dls, copy.deepcopy(model),
                        cbs=[make_cb(name, teacher), mixer, MixedLabels(), clean, spy])
    loss_func = learn.loss_func
    learn.fit(1)
    assert learn.loss_func is loss_func
    y, x, x_adv = at[0], clean.xb[0].as_subclass(torch.Tensor), spy.xb[0].as_subclass(torch.Tensor)
    assert (y.max(1).values < 1).any() and not torch.equal(x, next(iter(dls.train))[0].as_subclass(torch.Tensor))
    with torch.no_grad():
        s, s_adv, t, t_adv = model(x), model(x_adv), teacher(x).softmax(1), teacher(x_adv).softmax(1)
        want = dict(at=lambda: F.cross_entropy(s_adv, y), trades=lambda: trades_loss(s, s_adv, y),
                    akd=lambda: akd_loss(s_adv, t_adv, y, .8), rslad=lambda: rslad_loss(s, s_adv, t, y, .8),
                    ard=lambda: ard_loss(s, s_adv, t, y, .8), ckd=lambda: ckd_loss(s, t, y),
                    adaad=lambda: adaad_loss(s, s_adv, t, t_adv, y, .8, .6))[name]()
    assert spy.losses[0] == pytest.approx(want.item(), rel=1e-4)
    # the attack went for the mixed labels: it raised their cross-entropy
    if name in ('at', 'akd', 'ard'): assert F.cross_entropy(s_adv, y) > F.cross_entropy(s, y)

def test_mixup_ends_with_the_fit(make_learner, make_dls, tiny_net):
    "A later fit without MixUp has hard labels again"
    learn = make_learner(make_dls(), cbs=make_cb('akd', tiny_net(seed=7)))
    learn.fit(1, cbs=MixUp())
    seen = []
    class SeesTarg(Callback):
        order, run_valid = 50, False
        def before_batch(self): seen.append(self.learn.akd.targ)
    learn.fit(1, cbs=SeesTarg())
    assert seen and all(t.dtype == torch.int64 for t in seen)

@each
def test_no_gradient_is_left_by_the_attack(name, make_learner, make_dls, tiny_net):
    "When the loss is known and nothing has gone backwards yet, no gradient is there"
    class NoGrad(Callback):
        order, run_valid = 50, False
        def after_loss(self): assert all(p.grad is None or not p.grad.any() for p in self.learn.model.parameters())
        def before_batch(self): assert all(p.requires_grad for p in self.learn.model.parameters())
    make_learner(make_dls(), cbs=[make_cb(name, tiny_net(seed=7)), NoGrad()]).fit(2)

class MixedPrecisionOnCPU(MixedPrecision):
    "fastai's callback, event by event, with the CPU's autocast and gradient scaler"
    def before_fit(self):
        half = torch.bfloat16 if self.amp_mode == AMPMode.BF16 else torch.float16
        self.autocast,self.learn.scaler,self.scales = (
            torch.autocast('cpu', half),
            torch.amp.GradScaler('cpu', enabled=half is torch.float16, **self.kwargs), L())

@each
@pytest.mark.parametrize('amp', ['bf16', 'fp16'])
def test_mixed_precision(name, amp, make_learner, make_dls, tiny_net):
    """With `bf16=False` the attack is float32's to the bit, unscaled; the training step's gradients are, up to
    rounding, for every parameter: no copy of a weight lost its gradient, and the scale, 2¹⁰ here, has gone again"""
    def grads(cbs):
        g, spy = Grads(), Spy()
        attack = PGD(.1, steps=2, random_start=False)
        cb = (make_cb(name, tiny_net(seed=7), attack) if name != 'trades'
              else TRADES(PGD(.1, steps=2, random_start=False)))
        cb.bf16 = False
        sgd_learner(make_learner, make_dls(n=64, bs=64, shuffle=False), tiny_net(bn=False),
                    cbs=[cb, g, spy, *cbs]).fit(1)
        return g.grads[0], spy
    (got, spy), (want, exact) = (
        grads([MixedPrecisionOnCPU(amp, **dict(init_scale=2.**10) if amp == 'fp16' else {})]), grads([]))
    assert torch.equal(spy.xb[0], exact.xb[0])
    assert spy.pred[0].dtype == torch.float32 and spy.losses[0] == pytest.approx(exact.losses[0], rel=.02)
    for g,w in zip(got, want):
        assert F.cosine_similarity(g.flatten(), w.flatten(), 0) > .995 and .95 < g.norm()/w.norm() < 1.05
        assert not torch.equal(g, w) # autocast was on

@pytest.mark.parametrize('amp,bf16,hardware,runs_in', [
    ('bf16', None, True, 'bf16'), ('fp16', None, True, 'bf16'), ('bf16', None, False, 'float32'),
    ('none', None, True, 'float32'), ('bf16', False, True, 'float32'), ('none', True, True, 'bf16')])
def test_attack_and_teacher_follow_the_precision_of_the_learner(amp, bf16, hardware, runs_in, make_learner, tiny_net,
                                                                monkeypatch):
    "After `to_bf16` and `to_fp16` they run in bfloat16 where the hardware has it, unless `bf16` says otherwise"
    monkeypatch.setattr('rkd_fastai.callback.adversarial.has_bf16', lambda device: hardware)
    student,teacher,seen = tiny_net(),Teacher(tiny_net(seed=7)),[]
    def record(m, args, out): seen.append((m.training, out.dtype))
    student[-1].register_forward_hook(record); teacher.members[0].model[-1].register_forward_hook(record)
    learn = make_learner(model=student, cbs=AKDCallback(teacher, attack=PGD(.1, steps=2), bf16=bf16))
    learn.fit(1, cbs=[] if amp == 'none' else MixedPrecisionOnCPU(amp))
    # the first batch is tried out in float32, and the validation does not run under `RobustCallback`
    last_step = seen[max(i for i,(training,_) in enumerate(seen) if training)-3:][:3]
    assert [t for t,_ in last_step] == [False]*3
    assert {d for _,d in last_step} == {torch.bfloat16 if runs_in == 'bf16' else torch.float32}

@pytest.mark.parametrize('half', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('how', ['autocast', 'model'])
def test_gradients_that_underflow_in_half_precision(half, how, tiny_net, make_dls):
    """A confident network's input gradients, of a mean loss in half precision, are nought: pixels would stay where
    they are"""
    model, x = tiny_net(bn=False).eval(), torch.rand(32, 1, 8, 8)
    with torch.no_grad(): model[-1].weight.mul_(60); model[-1].bias.mul_(60)
    y = model(x).argmax(1)
    moved = lambda x_adv: ((x_adv.float() - x).abs() > .05).float().mean().item() # of .1, or less at 0 and 1
    exact = PGD(.1, random_start=False)(model, x, y)
    if how == 'autocast':
        with torch.autocast('cpu', half): x_adv = PGD(.1, random_start=False)(model, x, y)
    else: x_adv = PGD(.1, random_start=False)(copy.deepcopy(model).to(half), x.to(half), y)
    assert moved(x_adv) > moved(exact) - .02 and moved(exact) > .8
    loss = lambda x_adv: F.cross_entropy(model(x_adv.float()), y).item()
    assert loss(x_adv) > .95*loss(exact)

@pytest.mark.cuda
@each
@pytest.mark.parametrize('to', ['to_fp16', 'to_bf16'])
@pytest.mark.parametrize('bf16', [False, True], ids=['', 'bf16'])
@pytest.mark.parametrize('compile', [False, True], ids=['', 'compiled'])
def test_mixed_precision_on_the_gpu(name, to, bf16, compile, make_learner, make_dls, tiny_net):
    "Trains to nearly the same weights as in float32"
    def train(turn):
        torch.manual_seed(3)
        cb = make_cb(name, tiny_net(seed=7))
        cb.bf16, cb.compile = bf16, compile
        learn = make_learner(make_dls(n=128, bs=32, shuffle=False, device='cuda'), tiny_net(), cbs=cb)
        turn(learn).fit(2, .01)
        return torch.cat([w.flatten() for w in weights(learn.model)])
    start = torch.cat([w.flatten() for w in weights(tiny_net().cuda())])
    got, want = train(lambda l: getattr(l, to)()), train(lambda l: l)
    apart = (got - want).abs()/(.02 + .1*want.abs())
    assert (apart > 1).float().mean() < .01 # Adam makes a whole step of a gradient that vanishes, one way or the other
    assert (got - want).norm() < .1*(want - start).norm()

@pytest.mark.parametrize('decay', [.5, .995])
def test_weight_averaging_is_timms(decay, make_learner, make_dls, tiny_net):
    from timm.utils import ModelEmaV2
    model = tiny_net()
    class Timm(Callback):
        order, run_valid = 50, False
        def before_train(self):
            if not hasattr(self, 'ema'): self.ema = ModelEmaV2(self.learn.model, decay=decay)
        def after_step(self): self.ema.update(self.learn.model)
    class RawWeights(Callback):
        order = -10 # before the average is loaded
        def after_train(self): self.weights = weights(model)
    timm, raw, val = Timm(), RawWeights(), []
    class AtValidation(Callback):
        order = 50
        def before_validate(self): val.append(weights(model))
    learn = make_learner(make_dls(), model, cbs=[WeightAveraging(decay, ramp=False), timm, raw, AtValidation()])
    learn.fit(2, .01)
    ema = dict(timm.ema.module.named_parameters())
    for k,p in model.named_parameters(): torch.testing.assert_close(p.detach(), ema[k].detach(), rtol=1e-5, atol=1e-6)
    assert same(val[-1], weights(model)) and not same(raw.weights, weights(model)) # validated on what is kept

def test_weight_averaging_trains_on_raw_weights(make_learner, make_dls, tiny_net):
    "The average is only looked at: the trajectory is that of a fit without it"
    def train(cbs):
        class RawWeights(Callback):
            order = -10
            def after_train(self): self.weights = weights(self.learn.model)
        torch.manual_seed(3); raw = RawWeights()
        make_learner(make_dls(shuffle=False), tiny_net(), cbs=[raw, make_cb('akd', tiny_net(seed=7)), *cbs]).fit(3, .01)
        return raw.weights
    close(train([WeightAveraging(.9)]), train([]), rtol=0, atol=0)

def test_weight_averaging_with_gradient_accumulation_counts_steps(make_learner, make_dls, tiny_net):
    model, steps = tiny_net(bn=False), []
    class Step(Callback):
        run_valid = False
        def after_step(self): steps.append([p.detach().clone() for p in model.parameters()])
    start = [p.detach().clone() for p in model.parameters()]
    make_learner(make_dls(n=128), model,
                 cbs=[WeightAveraging(.5, ramp=False), GradientAccumulation(64), Step()]).fit(1, .01)
    assert len(steps) == 2
    for p,a,b,c in zip(model.parameters(), start, *steps):
        torch.testing.assert_close(p.detach(), (a/2 + b/2)/2 + c/2, rtol=1e-5, atol=1e-7)

def test_keep_epochs(make_learner, make_dls, tiny_net):
    "Weights as they were validated, and cards that say what the recorder does"
    learn = make_learner(make_dls(), tiny_net(), metrics=[accuracy, RobustAccuracy(PGD(.1, steps=1))],
                         cbs=[make_cb('at', None), KeepEpochs(2, 'teacher', dict(seed=3)), WeightAveraging(.5)])
    learn.fit(5, .01)
    folder, values = learn.path/learn.model_dir, learn.recorder.values
    assert sorted(p.name for p in folder.iterdir()) == [
        'teacher_2.json', 'teacher_2.pth', 'teacher_4.json', 'teacher_4.pth']
    learn.validate(); learn.get_preds()
    assert len(list(folder.iterdir())) == 4
    early = load_teacher(folder/'teacher_4.pth', tiny_net())
    assert not same(weights(early.members[0].model), weights(learn.model))
    for n in (2, 4):
        card = json.loads((folder/f'teacher_{n}.json').read_text())
        assert [card[k] for k in ('train_loss','valid_loss','accuracy','robust_accuracy')] == list(values[n-1])
        assert card | dict(epoch=n, seed=3, arch='Sequential', method='adversarial_training',
                           vocab=[str(i) for i in range(10)], attack=repr(PGD(.1, steps=2))) == card
        teacher = Teacher.at_epoch(folder, n, tiny_net(), fname='teacher')
        learn.model.load_state_dict(teacher.members[0].model.state_dict())
        assert list(learn.validate()) == pytest.approx([card[k] for k in ('valid_loss','accuracy','robust_accuracy')])
        make_learner(cbs=AKDCallback(teacher, attack=PGD(.1, steps=1))).fit(1) # classes in the order of the card
    best = best_epoch(folder, fname='teacher')
    assert best == max((2, 4), key=lambda n: json.loads((folder/f'teacher_{n}.json').read_text())['robust_accuracy'])

def test_an_early_teacher_normalises_as_its_learner_did(make_learner, make_dls, tiny_net):
    "The card says by what; without Normalize it says nothing, and what the caller says comes first"
    learn = make_learner(make_dls(stats=([.3], [.4])), tiny_net(), cbs=KeepEpochs())
    learn.fit(1, .01)
    path,x = learn.path/learn.model_dir/'epoch_1.pth', pixel_data(learn)[0]
    want,other = Teacher(learn).probs(x), load_teacher(path, tiny_net(), mean=.5, std=.25).probs(x)
    for teacher in (Teacher.at_epoch(path.parent, 1, tiny_net()), load_teacher(path, tiny_net())):
        close(teacher.probs(x), want, rtol=1e-6, atol=1e-7)
    close(other, learn.model.eval()((x-.5)/.25).softmax(1), rtol=1e-5, atol=1e-6)
    assert (other-want).abs().max() > .01
    learn = make_learner(make_dls(), tiny_net(), cbs=KeepEpochs(fname='plain'))
    learn.fit(1, .01)
    assert 'mean' not in json.loads((path.parent/'plain_1.json').read_text())
    close(Teacher.at_epoch(path.parent, 1, tiny_net(), fname='plain').probs(x), Teacher(learn).probs(x),
          rtol=1e-6, atol=1e-7)

def test_two_methods_at_once_are_refused(make_learner, tiny_net):
    "They would attack what is attacked already: twice the radius"
    learn = make_learner(model=tiny_net()).to_adversarial(PGD(.1, steps=1))
    before = weights(learn.model)
    with pytest.raises(ValueError, match='AdversarialTraining and AKDCallback would both|'
                                         'AKDCallback and AdversarialTraining would both'):
        learn.fit(1, cbs=make_cb('akd', tiny_net(seed=7)))
    assert (same(before, weights(learn.model))
            and [type(cb) for cb in learn.cbs if isinstance(cb, RobustCallback)] == [AdversarialTraining])
    learn.to_rkd(tiny_net(seed=7), attack=PGD(.1, steps=1)).fit(1)
    # the same one again
    with pytest.raises(ValueError, match='AKDCallback and AKDCallback would both'): learn.fit(1, cbs=learn.akd)

@pytest.mark.parametrize('when', ['weights', 'card'])
def test_killed_while_keeping_an_epoch(when, make_learner, make_dls, tiny_net, monkeypatch):
    "What was there is whole; a half-written epoch is none"
    from rkd_fastai.callback import keep
    learn = make_learner(make_dls(), tiny_net(), metrics=accuracy, cbs=KeepEpochs())
    learn.fit(2, .01)
    folder = learn.path/learn.model_dir
    old = {p.name: p.read_bytes() for p in folder.iterdir()}
    def interrupt(*args, **kwargs): raise KeyboardInterrupt
    if when == 'card': monkeypatch.setattr(keep, 'write_atomic', interrupt)
    else: monkeypatch.setattr(torch, 'save', interrupt)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, .01)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*old, *['epoch_3.pth']*(when == 'card')])
    assert all((folder/name).read_bytes() == b for name,b in old.items())
    Teacher.at_epoch(folder, 1, tiny_net())


# --- collapse ---

@pytest.mark.parametrize('stop', [False, True], ids=['warns', 'stops'])
def test_catastrophic_overfitting(stop, make_learner, make_dls, plain_net, robust_net, capsys):
    """Networks that withstand PGD, and then one that does not: told at once, and undone if asked to; a fall that is
    allowed is nothing"""
    class Script(Callback):
        order, run_valid = 60, False
        def after_train(self):
            self.model.load_state_dict([robust_net, robust_net, plain_net, plain_net][self.epoch].state_dict())
    def learner(**kw):
        cb = CatastrophicOverfitting(stop=stop, **kw)
        return make_learner(make_dls(n_valid=96), copy.deepcopy(robust_net),
                            cbs=[AdversarialTraining(FFGSM(.1)), cb, Script()]), cb
    learn, cb = learner()
    if stop: learn.fit(4, 0.)
    else:
        with pytest.warns(UserWarning, match=r'catastrophic overfitting: in epoch 3 the accuracy of 96 images under '
                                             r'PGD\(eps=0.1, steps=5.* fell from \d'):
            learn.fit(4, 0.)
    assert len(learn.recorder.values) == (3 if stop else 4)
    assert same(weights(learn.model), weights(robust_net if stop else plain_net))
    assert ('in epoch 3' in capsys.readouterr().out) == stop
    learn, _ = learner(drop=1.)
    learn.fit(4, 0.)
    assert len(learn.recorder.values) == 4
    other, _ = learner(attack=PGD(0., steps=0, random_start=False)) # clean accuracy does not collapse
    other.fit(4, 0.)
    assert len(other.recorder.values) == 4

def test_averaging_counts_the_steps_that_were_taken(make_learner, make_dls):
    "A step that a `GradScaler` leaves out is none of the average's"
    class Skip(Callback):
        order, run_valid = 10, False # as fastai's MixedPrecision
        def before_step(self):
            if self.iter == 1: raise CancelStepException
    ema = WeightAveraging()
    make_learner(make_dls(), cbs=[ema, Skip()]).fit(1)
    assert ema.t == 2

def test_cache_of_what_is_other_in_every_epoch(tiny_net):
    AKDCallback(tiny_net(), attack=PGD(objective='kl'), cache=True) # whose attack asks about clean images
    with pytest.raises(ValueError, match='`cache=True`'): AKDCallback(tiny_net(), cache=True)

def test_catastrophic_overfitting_without_an_attack(make_learner, make_dls):
    with pytest.raises(ValueError, match='takes `eps` from the training attack, but finds none'):
        make_learner(make_dls(), cbs=CatastrophicOverfitting()).fit(1)
    learn = make_learner(make_dls(), cbs=CatastrophicOverfitting(PGD(.1, steps=1)))
    learn.fit(1); learn.validate(); learn.get_preds()

@pytest.mark.parametrize('cbs', [[], [CatastrophicOverfitting()]], ids=['', 'watched'])
def test_watching_changes_nothing(cbs, make_learner, make_dls, tiny_net):
    "Random numbers, weights and modes are as without"
    torch.manual_seed(5)
    learn = make_learner(make_dls(shuffle=False), tiny_net(dropout=.2), cbs=[AdversarialTraining(FFGSM(.1)), *cbs])
    learn.fit(2, .01)
    torch.manual_seed(5)
    plain = make_learner(make_dls(shuffle=False), tiny_net(dropout=.2), cbs=AdversarialTraining(FFGSM(.1)))
    plain.fit(2, .01)
    close(weights(learn.model), weights(plain.model), rtol=0, atol=0)


# --- the teacher ---

@distilled
def test_teacher_does_not_move(name, make_learner, make_dls, tiny_net):
    source = make_learner(make_dls(stats=PLAIN_STATS), tiny_net(seed=7, dropout=.5))
    net, before = source.model, weights(source.model)
    cb = make_cb(name, Teacher([source, tiny_net(seed=8)]))
    t_before = weights(cb.teacher)
    learn = make_learner(make_dls(), cbs=cb)
    learn.fit_one_cycle(2, .1)
    assert same(t_before, weights(cb.teacher)) and same(before, weights(net))
    assert all(p.grad is None and not p.requires_grad for p in cb.teacher.parameters())
    assert not any(m.training for m in cb.teacher.modules())
    ids = {id(p) for p in cb.teacher.parameters()}
    assert (not any(id(p) in ids for g in learn.opt.param_lists for p in g)
            and not any(id(p) in ids for p in learn.model.parameters()))
    # what the teacher was made of still trains, without the teacher following it
    source.fit(1, .1)
    assert (not same(before, weights(net)) and same(t_before, weights(cb.teacher))
            and all(p.requires_grad for p in net.parameters()))

@pytest.mark.parametrize('certainty', [1, 200])
def test_adaad_attacks_student_and_teacher(certainty, make_learner, make_dls, tiny_net):
    """Each step asks an ensemble on x′ and takes its gradient, too, even where a probability underflows in float32; in
    the L2 norm no sign hides a small difference"""
    model, a, b = tiny_net(), tiny_net(seed=7).eval(), tiny_net(seed=7).eval()
    for net,k in ((a, 1), (b, 2)): net[-1].requires_grad_(False).weight.mul_(k*certainty) # they rule out alike
    attack = PGD(.5, steps=3, step_size=.15, norm='L2', random_start=False, objective='kl')
    clean, spy = Clean(), Spy()
    sgd_learner(make_learner, make_dls(shuffle=False), copy.deepcopy(model),
                cbs=[AdaADCallback(Teacher([a, b], betas=[.25, .75]), attack=attack), clean, spy]).fit(1)
    for net in (model.eval(), a, b): net.double()
    x_adv = clean.xb[0].as_subclass(torch.Tensor).double()
    for _ in range(3): # shorter in all than the radius
        x_adv = x_adv.detach().requires_grad_()
        t = .25*a(x_adv).softmax(1) + .75*b(x_adv).softmax(1)
        g, = torch.autograd.grad((t*(t.log() - model(x_adv).log_softmax(1))).sum(), x_adv)
        x_adv = (x_adv + .15*F.normalize(g.flatten(1)).view_as(g)).clamp(0, 1)
    torch.testing.assert_close(spy.xb[0].as_subclass(torch.Tensor), x_adv.detach().float(), rtol=0, atol=1e-5)

def test_student_may_start_as_its_own_teacher(make_learner, make_dls, tiny_net):
    "Self-distillation: the teacher stays as the student was"
    model = tiny_net(); start = weights(model)
    learn = make_learner(make_dls(), model); learn.to_rkd(learn).fit(1, .05)
    teacher = next(cb for cb in learn.cbs if isinstance(cb, AKDCallback)).teacher
    assert not same(start, weights(model)) and same(start, weights(teacher.members[0].model))

@each
@pytest.mark.parametrize('interrupted', [False, True])
@pytest.mark.filterwarnings('ignore:.*load_learner')
def test_export(name, interrupted, make_learner, make_dls, tiny_net, tmp_path):
    "As large as a plain Learner's, without the teacher; it predicts, and after a new teacher it trains"
    big = nn.Sequential(nn.Flatten(), nn.Linear(64, 4000), nn.Linear(4000, 10)) # 1.2 MB
    def fit_and_export(fname, cbs):
        learn = make_learner(make_dls(), cbs=cbs)
        try: learn.fit(1, cbs=Stop('after_loss', KeyboardInterrupt) if interrupted else None)
        except KeyboardInterrupt: assert interrupted
        learn.export(fname)
        return learn
    fit_and_export('plain.pkl', None)
    learn = fit_and_export('ours.pkl', make_cb(name, big))
    size = lambda f: (tmp_path/f).stat().st_size
    assert abs(size('ours.pkl') - size('plain.pkl')) < 10_000
    again = load_learner(tmp_path/'ours.pkl')
    assert not any(isinstance(v, torch.Tensor) for cb in again.cbs if isinstance(cb, RobustCallback)
                   for v in vars(cb).values())
    item = make_dls().valid_ds[0][0]
    assert again.predict(item)[0] == learn.predict(item)[0]
    if name not in ('at', 'trades'):
        again.dls = make_dls()
        with pytest.raises(ValueError, match='teacher'): again.fit(1)
        again.to_rkd(big).fit(1)

def test_weight_averaging_is_not_exported(make_learner, make_dls, tmp_path):
    plain = make_learner(make_dls()); plain.fit(1); plain.export('plain.pkl')
    learn = make_learner(make_dls(), cbs=[WeightAveraging(), KeepEpochs()], metrics=RobustAccuracy())
    learn.fit(1)
    learn.export('ours.pkl')
    assert abs((tmp_path/'ours.pkl').stat().st_size - (tmp_path/'plain.pkl').stat().st_size) < 10_000


# --- after an interrupted fit ---

def continue_from(state, opt_state, make_learner, make_dls, tiny_net, name, how):
    "Weights after a fit of a Learner that was never interrupted, from a given state"
    learn = make_learner(make_dls(shuffle=False), tiny_net(), cbs=make_cb(name, tiny_net(seed=7)))
    learn.create_opt(); learn.model.load_state_dict(state)
    if opt_state: learn.opt.load_state_dict(opt_state)
    torch.manual_seed(5); how(learn)
    return weights(learn.model)

@pytest.mark.few(20)
@pytest.mark.parametrize('error', [CancelFitException, KeyboardInterrupt, RuntimeError, CancelTrainException,
                                   CancelEpochException])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_step', 'after_backward',
                                   'after_batch', 'after_step'])
@pytest.mark.parametrize('name', ['akd', 'rslad'])
def test_fit_after_an_interrupted_one(name, event, error, make_learner, make_dls, tiny_net):
    "It equals the fit of a Learner that was never interrupted, from the same weights and optimiser state"
    learn = make_learner(make_dls(shuffle=False), tiny_net(), cbs=make_cb(name, tiny_net(seed=7)))
    stop = Stop(event, error)
    try: learn.fit(2, .01, cbs=stop)
    except (KeyboardInterrupt, RuntimeError): assert error in (KeyboardInterrupt, RuntimeError)
    if error is not CancelTrainException and error is not CancelEpochException: assert stop.n == 2
    state, opt = copy.deepcopy(learn.model.state_dict()), copy.deepcopy(learn.opt.state_dict())
    torch.manual_seed(5); learn.fit(1, .01)
    want = continue_from(state, opt, make_learner, make_dls, tiny_net, name, lambda l: l.fit(1, .01))
    close(weights(learn.model), want, rtol=0, atol=0)

@pytest.mark.parametrize('name', ['at', 'akd', 'rslad', 'ard', 'ckd'])
def test_second_fit(name, make_learner, make_dls, tiny_net):
    learn = make_learner(make_dls(shuffle=False), tiny_net(), cbs=make_cb(name, tiny_net(seed=7)))
    learn.fit(1, .01)
    state, opt = copy.deepcopy(learn.model.state_dict()), copy.deepcopy(learn.opt.state_dict())
    torch.manual_seed(5); learn.fit_one_cycle(1, .01)
    want = continue_from(state, opt, make_learner, make_dls, tiny_net, name, lambda l: l.fit_one_cycle(1, .01))
    close(weights(learn.model), want, rtol=0, atol=0)

def test_fit_after_an_interrupted_accumulation(make_learner, make_dls, tiny_net):
    "Gradients that were being gathered belong to the fit that was interrupted"
    def learner():
        return make_learner(make_dls(shuffle=False), tiny_net(),
                            cbs=[make_cb('akd', tiny_net(seed=7)), GradientAccumulation(96)])
    learn = learner()
    with pytest.raises(KeyboardInterrupt): learn.fit(1, .01, cbs=Stop('after_backward', KeyboardInterrupt))
    state = copy.deepcopy(learn.model.state_dict())
    torch.manual_seed(5); learn.fit(1, .01)
    other = learner(); other.model.load_state_dict(state)
    torch.manual_seed(5); other.fit(1, .01)
    close(weights(learn.model), weights(other.model), rtol=0, atol=0)

@pytest.mark.parametrize('error', [KeyboardInterrupt])
@pytest.mark.parametrize('cb', [lambda: WeightAveraging(.5), lambda: KeepEpochs()], ids=['averaging', 'keeping'])
def test_fit_after_an_interrupted_lr_find(cb, error, make_learner, make_dls, tiny_net):
    "Callbacks that sit out `lr_find` are back in the next fit, however `lr_find` ended"
    class Interrupted(LRFinder):
        name = 'lr_finder'
        def after_batch(self): self.tmp_d.cleanup(); raise error('stopped')
    def train(interrupt):
        learn = make_learner(make_dls(shuffle=False), tiny_net(), cbs=cb(), model_dir=f'interrupted_{interrupt}')
        if interrupt:
            try: learn.fit(1, cbs=Interrupted())
            except KeyboardInterrupt: pass
            learn.model.load_state_dict(tiny_net().state_dict()); learn.opt = None
        learn.fit(1, .01)
        return weights(learn.model), sorted(p.name for p in (learn.path/learn.model_dir).glob('epoch*'))
    got, want = train(True), train(False)
    close(got[0], want[0], rtol=0, atol=0)
    assert got[1] == want[1]

def test_weight_averaging_after_an_interrupted_fit(make_learner, make_dls, tiny_net):
    learn = make_learner(make_dls(shuffle=False), tiny_net(), cbs=WeightAveraging(.5))
    with pytest.raises(KeyboardInterrupt): learn.fit(2, .01, cbs=Stop('after_batch', KeyboardInterrupt))
    state, opt = copy.deepcopy(learn.model.state_dict()), copy.deepcopy(learn.opt.state_dict())
    learn.fit(1, .01)
    other = make_learner(make_dls(shuffle=False), tiny_net(), cbs=WeightAveraging(.5))
    other.create_opt(); other.model.load_state_dict(state); other.opt.load_state_dict(opt); other.fit(1, .01)
    close(weights(learn.model), weights(other.model), rtol=0, atol=0)

@each
def test_nothing_of_a_batch_is_kept(name, make_learner, make_dls, tiny_net):
    learn = make_learner(make_dls(), cbs=make_cb(name, tiny_net(seed=7)))
    learn.fit(1)
    cb = next(cb for cb in learn.cbs if isinstance(cb, RobustCallback))
    held = [k for k,v in vars(cb).items() if isinstance(v, torch.Tensor)]
    assert held == []

@each
def test_checks_draw_no_random_numbers(name, make_learner, make_dls, tiny_net):
    "Looking at the data and the teacher before training starts does not shift what training draws"
    import random, numpy as np
    dls = make_dls()
    cb = make_cb(name, tiny_net(seed=7))
    random.seed(1); np.random.seed(1); torch.manual_seed(1)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    cb.check(dls)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert state[:2] == after[:2] and torch.equal(state[2], after[2])

def test_student_learns_from_the_teacher(make_learner, make_dls, digits, robust_net):
    "The point of it: a student distilled with AKD is robust, a plainly trained one is not"
    x, y, attack = digits.x[1497:], digits.y[1497:], PGD(.1, steps=10)
    def student():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1),
                             nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    dls = make_dls(n=1200, n_valid=50, bs=50)
    plain = make_learner(dls, student()); plain.fit_one_cycle(4, 3e-3)
    akd = make_learner(dls, student()).to_rkd(robust_net, attack=PGD(.1, steps=3)); akd.fit_one_cycle(4, 3e-3)
    robust = {k: robust_accuracy(l.model, x, y, attack) for k,l in dict(plain=plain, akd=akd).items()}
    assert robust['akd'] > robust['plain'] + .1 and robust_accuracy(akd.model, x, y, PGD(0., steps=0)) > .9

def test_weight_averaging_averages_tied_weights(make_dls, make_learner):
    "Both names of a tied weight hold the average, not the last step's weight"
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
            self.b.weight = self.a.weight
        def forward(self, x): return self.out(self.b(self.a(x.flatten(1)).relu()))
    class Last(Callback):
        order = 100
        def after_step(self): self.weight = self.model.a.weight.detach().clone()
    last = Last()
    learn = make_learner(make_dls(), Tied(), cbs=[WeightAveraging(.9, ramp=False), last])
    learn.fit(1, 1e-2)
    assert learn.model.a.weight is learn.model.b.weight
    assert (learn.model.a.weight - last.weight).abs().max() > 1e-3

# --- the teacher's clean answers, kept ---

class Counted(nn.Module):
    "A teacher that counts the images it sees"
    def __init__(self, net): super().__init__(); self.net,self.n = net,0
    def forward(self, x): self.n += len(x); return self.net(x)

@pytest.mark.parametrize('name', ['rslad', 'ard', 'ckd'])
def test_cache(name, make_learner, make_dls, tiny_net):
    "The same training, for one look of the teacher at each image; a second fit asks anew"
    found = []
    for cache in (False, True):
        cb = dict(rslad=RSLADCallback, ard=ARDCallback, ckd=CKDCallback)[name](
            Counted(tiny_net(seed=7)), T=2., cache=cache)
        if name != 'ckd': cb.attack = PGD(.1, steps=2)
        learn = make_learner(make_dls(n=96, bs=32), tiny_net(), cbs=cb)
        torch.manual_seed(5); random.seed(5); learn.dls.train.rng = random.Random(5)
        learn.fit(1)
        n, counted = {}, cb.teacher.members[0].model
        counted.n = 0; learn.fit(4); n[4] = counted.n
        counted.n = 0; learn.fit(1); n[1] = counted.n
        assert cb.kept is None # the answers go with the fit
        found.append((weights(learn.model), n))
    close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    # `check` looks too
    assert found[0][1][4] >= 4*96 and found[1][1][4] - found[1][1][1] == 0 and 96 <= found[1][1][1] < 110

def test_cache_refuses_augmented_images(make_learner, make_dls, tiny_net):
    dls = make_dls(batch_tfms=PadCropFlip(1))
    with pytest.raises(ValueError, match='`cache=True` needs images that are the same'):
        make_learner(dls, cbs=RSLADCallback(tiny_net(seed=7), cache=True, attack=PGD(.1, steps=1))).fit(3)
    learn = make_learner(dls, cbs=RSLADCallback(tiny_net(seed=7), attack=PGD(.1, steps=1)))
    learn.fit(3)

@pytest.mark.parametrize('turn', [lambda learn: learn.to_adversarial(PGD(.1, steps=1)),
                                  lambda learn: learn.to_rkd(learn.model, attack=PGD(.1, steps=1))], ids=['at','akd'])
def test_mixup_where_nobody_tells_the_number_of_classes(turn, tiny_net):
    "Plain PyTorch data have no vocab: the network is asked"
    ds = torch.utils.data.TensorDataset(torch.rand(24, 1, 8, 8), torch.randint(0, 10, (24,)))
    learn = turn(Learner(DataLoaders.from_dsets(ds, ds, bs=12), tiny_net(), loss_func=CrossEntropyLossFlat()))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=MixUp())
