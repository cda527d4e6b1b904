"A run whose numbers overflow stops before the step, names what overflowed and where, and can be fitted again."
import copy

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.vision.all import Callback, SGD, MixUp

from rkd_fastai.all import (Attack, ARDCallback, AdversarialTraining, AKDCallback, CKDCallback, NonFinite, PGD,
                            RSLADCallback, Resume, Teacher, TRADES, WeightAveraging)
from rkd_fastai.callback import monitor

nan, inf = float('nan'), float('inf')
pgd = PGD(.1, steps=1)

class AtStart(Callback):
    "The state of the model that each training batch starts from"
    order, run_valid = -9, False
    def before_batch(self): self.state = copy.deepcopy(self.model.state_dict())

def stops(learn, *says, lr=1e-2):
    """The last line of the error that `learn.fit(3)` ends with; the weights are those before that batch, and a
    further fit is well"""
    learn.add_cb(was := AtStart())
    with pytest.raises(FloatingPointError) as e: learn.fit(3, lr)
    for s in says: assert s in str(e.value), str(e.value)
    assert isinstance(e.value, ValueError)
    assert all(torch.equal(v, was.state[k]) for k,v in learn.model.state_dict().items())
    assert all(p.grad is None or p.grad.isfinite().all() for p in learn.model.parameters())
    return str(e.value)

def is_well(learn):
    learn.fit(1)
    assert all(v.isfinite().all() for v in learn.model.state_dict().values())
    assert learn.recorder.values[-1][0] < 10

class Later:
    "What is well for `n` calls, and then once is not"
    def __init__(self, n): self.left = n
    def now(self): self.left -= 1; return self.left == -1

class BadAttack(Attack):
    def __init__(self, n, value): self.later, self.value = Later(n), value
    settings = {} # for `Resume` the same attack
    def perturb(self, model, x, targ):
        x = pgd.perturb(model, x, targ)
        if self.later.now(): x[1,0,2,3] = self.value
        return x

class BadNet(nn.Module):
    "A network that once, in training, is multiplied by `value`"
    def __init__(self, net, n, value): super().__init__(); self.net, self.later, self.value = net, Later(n), value
    def forward(self, x): return self.net(x)*(self.value if self.training and self.later.now() else 1.)

class BadTeacher(nn.Module):
    "One that returns NaN for one image of a batch once its calls are used up"
    def __init__(self, n):
        super().__init__()
        self.calls, self.net = [n], nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    def forward(self, x):
        self.calls[0] -= len(x) == 32 # the first check asks about two, and that of its accuracy about a batch
        return self.net(x) * torch.tensor([nan if self.calls[0] == -1 and len(x) == 32 else 1.]
                                          + [1.]*(len(x)-1))[:,None]

def methods(teacher=None, attack=pgd):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) if teacher is None else teacher
    return dict(at=AdversarialTraining(attack), trades=TRADES(attack), akd=AKDCallback(teacher, attack=attack),
                rslad=RSLADCallback(teacher, attack=attack), ard=ARDCallback(teacher, attack=attack),
                ckd=CKDCallback(teacher))
attacking = [k for k in methods() if k != 'ckd']

@pytest.mark.parametrize('value', [nan, inf, -inf])
@pytest.mark.parametrize('method', attacking)
def test_attack(make_learner, method, value):
    learn = make_learner(cbs=[methods(attack=BadAttack(4, value))[method], NonFinite()])
    stops(learn, 'epoch 2, batch 2: ',
          'given images that contain NaN or inf' if method == 'akd' else 'the adversarial images contain NaN',
          'check the attack')
    is_well(learn)

@pytest.mark.parametrize('method', ['akd','rslad','ard','ckd'])
def test_teacher(make_learner, method):
    learn = make_learner(cbs=[methods(BadTeacher(5))[method], NonFinite()])
    stops(learn, 'epoch 2, batch 2: ', '`teacher` returned NaN or infinite probabilities for 1 of 32 images')
    is_well(learn)

class Unchecked(Teacher):
    def probs(self, x, T=1.): return super().probs(x, T)*(nan if x.shape[0] == 32 else 1.)
def test_teacher_that_does_not_look_itself(make_learner):
    stops(make_learner(cbs=[RSLADCallback(Unchecked(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), attack=pgd),
                            NonFinite()]), "epoch 1, batch 1: the teacher's probabilities contain NaN")

@pytest.mark.parametrize('method', [None, *methods()])
def test_images(make_learner, make_dls, method):
    class BadImage(Callback):
        order, run_valid, later = -20, False, Later(4)
        def before_batch(self):
            if self.later.now(): self.learn.xb = (self.xb[0].clone().fill_(nan),)
    learn = make_learner(cbs=[BadImage(), NonFinite(), *([methods()[method]] if method else [])])
    stops(learn, 'epoch 2, batch 2: ', 'images', 'contain NaN or infinite values')
    is_well(learn)

@pytest.mark.parametrize('value', [nan, inf, 3e38])
@pytest.mark.parametrize('method', [None, *methods()])
def test_logits(make_learner, tiny_net, method, value):
    learn = make_learner(model=BadNet(tiny_net(), 4 if method not in ('trades','rslad','ard') else 8, value),
                         cbs=[NonFinite(), *([methods()[method]] if method else [])])
    with torch.no_grad(): learn.model.net[-1].weight.mul_(20)
    message = stops(learn, 'epoch 2, batch 2: ',
                    "the student's logits contain NaN or infinite values: lower the learning rate")
    assert 'The weights are still those before this batch' in message

@pytest.mark.parametrize('method', ['at','akd','rslad','trades'])
def test_logits_that_overflow_under_the_attack_too(make_learner, method):
    "The attack is not blamed: where there is no gradient it leaves the image in its ball"
    learn = make_learner(cbs=[NonFinite(), methods()[method]])
    with torch.no_grad(): learn.model[-1].weight.fill_(3e38)
    stops(learn, "epoch 1, batch 1: the student's logits contain NaN")

class OddLoss(nn.Module):
    "Cross-entropy that once is `value`, or whose gradient is"
    def __init__(self, n, value, gradient):
        super().__init__()
        self.later, self.value, self.gradient = Later(n), value, gradient
    def forward(self, pred, targ):
        loss = F.cross_entropy(pred, targ)
        if not torch.is_grad_enabled() or not self.later.now(): return loss
        if not self.gradient: return loss + self.value
        odd = (pred - pred.detach()).abs()/2 # 0
        odd.register_hook(lambda g: g*self.value)
        return loss + odd.sum()

@pytest.mark.parametrize('value', [nan, inf])
def test_loss(make_learner, value):
    learn = make_learner(loss_func=OddLoss(4, value, False), cbs=NonFinite())
    stops(learn, 'epoch 2, batch 2: the loss contains NaN or infinite values: lower')
    is_well(learn)

@pytest.mark.parametrize('with_', [None, GradientClip(1.), GradientAccumulation(64), WeightAveraging(.9)], ids=repr)
def test_gradients_of_a_finite_loss(make_learner, with_):
    learn = make_learner(cbs=[NonFinite(), *([with_] if with_ else [])])
    def bad(g): return torch.full_like(g, nan) if later.now() else g
    later, hook = Later(4), next(learn.model.parameters()).register_hook(lambda g: bad(g))
    stops(learn, 'epoch 2, batch 2: the gradients contain NaN or infinite values: lower', 'GradientClip')
    hook.remove()
    is_well(learn)

@pytest.mark.parametrize('method', [None, *methods()])
def test_student_diverges(make_learner, method):
    learn = make_learner(opt_func=SGD, cbs=[NonFinite(), *([methods()[method]] if method else [])])
    with pytest.raises(FloatingPointError, match=r'epoch \d, batch \d: .*lower the learning rate'): learn.fit(3, 1e20)

def test_last_step_overflows(make_learner):
    learn = make_learner(opt_func=SGD, cbs=NonFinite())
    learn.add_cb(Callback(after_step=lambda self: self.model[0].weight.data.fill_(inf)
                          if (self.epoch, self.iter) == (1, 2) else None))
    with pytest.raises(FloatingPointError, match="epoch 2, batch 3: the student's weights are not finite: "
                                                 "lower the learning rate"):
        learn.fit(2)

@pytest.mark.parametrize('method', [None, *methods()])
def test_weights_are_the_cause(make_learner, method):
    "However they show"
    learn = make_learner(cbs=[NonFinite(), *([methods()[method]] if method else [])])
    learn.add_cb(Callback(after_step=lambda self: self.model[0].weight.data.fill_(nan) if self.iter == 1 else None))
    with pytest.raises(FloatingPointError, match="epoch 1, batch 3: the student's weights are not finite: "
                                                 "lower the learning rate"):
        learn.fit(1)

class Two(nn.Module):
    "Two heads, in a dict"
    def __init__(self): super().__init__(); self.heads = nn.ModuleList([nn.Linear(64, 10), nn.Linear(64, 10)])
    def forward(self, x): return {k: [h(x.flatten(1))] for k,h in zip('ab', self.heads)}
def test_network_of_two_heads(make_learner):
    learn = make_learner(model=Two(), loss_func=lambda pred, y: F.cross_entropy(pred['a'][0], y), cbs=NonFinite())
    learn.fit(1)
    learn.model.heads[1].register_forward_hook(lambda m, i, o: o/0 if m.training else o)
    stops(learn, 'epoch 1, batch 1', "student's logits")

@pytest.mark.parametrize('method', [None, *methods()])
def test_changes_no_bit(make_learner, make_dls, tiny_net, method):
    "Also not that of a network with Dropout, MixUp, accumulation and clipping"
    ends = []
    for watch in ([], [NonFinite()]):
        torch.manual_seed(0)
        cbs = [methods()[method]] if method else []
        learn = make_learner(model=tiny_net(dropout=.3),
                             cbs=[*watch, *cbs, MixUp(.4), GradientAccumulation(64), GradientClip(1.)])
        torch.manual_seed(0)
        learn.dls.rng.seed(0)
        learn.fit_one_cycle(2, 1e-2)
        ends.append(({k: v.clone() for k,v in learn.model.state_dict().items()}, torch.get_rng_state(),
                     [list(v)[:-1] for v in learn.recorder.values]))
    (a, rng_a, seen_a), (b, rng_b, seen_b) = ends
    assert all(torch.equal(v, b[k]) for k,v in a.items()) and torch.equal(rng_a, rng_b) and str(seen_a) == str(seen_b)

def test_one_wait_a_batch(make_learner, monkeypatch):
    "What it asks a GPU for is read at once"
    learn, n = make_learner(cbs=NonFinite()), []
    plain = monitor.read_values
    monkeypatch.setattr(monitor, 'read_values', lambda t: n.append(t.shape) or plain(t))
    learn.fit(1)
    assert n == [(5,)]*len(learn.dls.train)

class Scaler:
    "A GradScaler as far as it is asked"
    def __init__(self, scale, enabled=True): self.scale, self.enabled = scale, enabled
    def is_enabled(self): return self.enabled
    def get_scale(self): return self.scale
@pytest.mark.parametrize('scaler, trips', [(Scaler(65536.), False), (Scaler(1.), False), (Scaler(.5), True),
                                           (Scaler(65536., False), True)])
def test_gradients_that_a_scaler_leaves_out(make_learner, scaler, trips):
    learn = make_learner(cbs=NonFinite(), opt_func=SGD)
    learn.scaler = scaler
    class Scaled(Callback): # as MixedPrecision's
        order, left = 10, 0
        def before_step(self):
            if not all(p.grad.isfinite().all() for p in self.model.parameters()):
                self.left += 1
                from fastai.callback.core import CancelStepException
                raise CancelStepException
    learn.add_cb(Scaled())
    later = Later(1)
    next(learn.model.parameters()).register_hook(lambda g: g/0 if later.now() else g)
    if trips: stops(learn, 'batch 2: the gradients')
    else: learn.fit(1); assert learn.scaled.left == 1

@pytest.mark.filterwarnings('ignore:.*numpy.core is deprecated') # fastai's `learn.load`, which ends `lr_find`
def test_asleep_where_nothing_is_trained(make_learner):
    "`lr_find` may overflow, and `validate` and `get_preds` look at what they like"
    learn = make_learner(cbs=NonFinite(), opt_func=SGD, loss_func=OddLoss(3, inf, False))
    learn.lr_find(end_lr=1e35, num_it=12, stop_div=False, show_plot=False, suggest_funcs=())
    assert learn.loss_func.later.left < -1 # it was there, and was passed
    learn.model.eval()[-1].bias.data[0] = nan
    learn.validate(); learn.get_preds()

def test_resume_takes_it_or_leaves_it(make_learner, tmp_path):
    "`NonFinite` may be there in one part of a run and not in the other"
    class Killed(Callback):
        only_shows, order = True, 1001
        def __init__(self, now): self.now = now
        def after_epoch(self): assert not self.now or self.epoch < 1
    def fit(cbs, path, killed=True):
        torch.manual_seed(0)
        learn = make_learner(cbs=[AdversarialTraining(pgd), *cbs, Resume(path), Killed(killed)])
        learn.dls.rng.seed(0)
        if killed:
            with pytest.raises(AssertionError): learn.fit(4)
        else: learn.fit(4)
        return learn.model.state_dict()
    whole = fit([NonFinite()], tmp_path/'a', False)
    for i,(first, then) in enumerate([([], [NonFinite()]), ([NonFinite()], [])]):
        fit(first, tmp_path/f'{i}')
        got = fit(then, tmp_path/f'{i}', False)
        assert all(torch.equal(v, whole[k]) for k,v in got.items())

def test_counts_on_after_a_resume(make_learner, tmp_path):
    def fit(attack):
        learn = make_learner(cbs=[AdversarialTraining(attack), NonFinite(), Resume(tmp_path/'a', every=1)])
        learn.fit(3)
    with pytest.raises(FloatingPointError, match='epoch 2, batch 2: the adversarial'): fit(BadAttack(4, nan))
    with pytest.raises(FloatingPointError, match='epoch 2, batch 3: the adversarial'): fit(BadAttack(1, inf))
    fit(BadAttack(100, nan))

def test_export_is_without_it(make_learner, tmp_path):
    learn = make_learner(loss_func=OddLoss(1, inf, False), cbs=NonFinite())
    stops(learn, 'loss')
    learn.loss_func = F.cross_entropy
    learn.export(tmp_path/'l.pkl')
    assert learn.non_finite.kept is None
