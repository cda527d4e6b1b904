"""Within a training step nothing waits for the GPU: no value is read on the CPU, except those of the checks, which are
read before the optimiser's step."""
from contextlib import contextmanager

import pytest, torch, torch.nn as nn
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.all import Callback, MixUp
from torch.utils._python_dispatch import TorchDispatchMode

from rkd_fastai import core
from rkd_fastai.all import (AdaADCallback, AdversarialTraining, AKDCallback, ARDCallback, CKDCallback, FFGSM, PGD,
                            RSLADCallback, Teacher, TRADES)
from rkd_fastai.callback.adversarial import RobustCallback

@pytest.fixture
def as_on_a_gpu(monkeypatch):
    "Treat values on the CPU like those on a GPU"
    monkeypatch.setattr(core, '_must_wait', lambda values: True)

reading = ['tolist','item','cpu','__bool__','__int__','__float__','__index__']
class NoReading(TorchDispatchMode):
    "Raise an error for operators whose result's shape or value the CPU needs"
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = str(f).split('.')[1]
        assert name not in ('_local_scalar_dense','nonzero','masked_select','equal','unique_dim','_unique2'), name
        assert name != 'index' or all(i is None or i.dtype != torch.bool for i in args[1]), 'index by a mask'
        return f(*args, **(kwargs or {}))

@contextmanager
def no_reading():
    def fail(*args, **kwargs): raise AssertionError('a value is read')
    with pytest.MonkeyPatch.context() as m, NoReading():
        for k in reading: m.setattr(torch.Tensor, k, fail)
        yield

@pytest.fixture
def guarded(monkeypatch):
    "Let training methods read nothing from the second batch on; return the list of the events that were guarded"
    call,seen = RobustCallback.__call__,[]
    def __call__(cb, event):
        if event not in ('before_batch','after_pred','after_loss','before_step') or not cb.training:
            return call(cb, event)
        if cb.learn.train_iter < 1: return call(cb, event)
        seen.append(event)
        with no_reading(): return call(cb, event)
    monkeypatch.setattr(RobustCallback, '__call__', __call__)
    return seen

class ReadByCheck:
    "What a check does once its values have arrived: it may read them"
    def __init__(self, values, check): self.values,self.check = values.detach().numpy(),check
    def __call__(self): self.check(self.values.tolist())

pgd = PGD(.1, steps=2)
methods = dict(at=lambda t: AdversarialTraining(pgd), ffgsm=lambda t: AdversarialTraining(FFGSM(.1)),
               l2=lambda t: AdversarialTraining(PGD(.5, norm='L2', steps=2, restarts=2)),
               cw=lambda t: AdversarialTraining(PGD(.1, objective='cw')),
               trades=lambda t: TRADES(PGD(.1, steps=2, objective='kl')), akd=lambda t: AKDCallback(t, attack=pgd),
               ensemble=lambda t: AKDCallback([t, t], attack=pgd, T=2),
               bf16=lambda t: AKDCallback(t, attack=pgd, bf16=True),
               rslad=lambda t: RSLADCallback(t, attack=PGD(.1, steps=2, objective='kl')),
               ard=lambda t: ARDCallback(t, attack=pgd), ckd=lambda t: CKDCallback(t),
               adaad=lambda t: AdaADCallback(t, attack=PGD(.1, steps=2, objective='kl')))

@pytest.mark.parametrize('name', methods)
@pytest.mark.parametrize('also', ['plain','mixup','labels'])
def test_nothing_is_read(name, also, make_learner, tiny_net, monkeypatch, as_on_a_gpu, guarded):
    monkeypatch.setattr(core, '_Check', ReadByCheck)
    cb = methods[name](Teacher(tiny_net(seed=1)))
    loss = CrossEntropyLossFlat(label_smoothing=.1, weight=torch.ones(10)) if also == 'labels' else None
    learn = make_learner(cbs=cb, **({} if loss is None else dict(loss_func=loss)))
    learn.fit(2, cbs=[MixUp()] if also == 'mixup' else [])
    assert len(guarded) == 5*4 # two epochs of three batches, without the first batch; four events

def test_the_guard_finds_a_value_that_is_read(make_learner, as_on_a_gpu, guarded):
    cb = AdversarialTraining(pgd)
    learn = make_learner(cbs=cb)
    def perturb(model, x, targ): return x if x.sum() > 1e9 else x
    cb.attack.perturb = perturb
    with pytest.raises(AssertionError, match='a value is read|_local_scalar_dense'): learn.fit(1)

class Spoiled(Callback):
    "Images of the second batch with one NaN, or far from the range of pixels"
    order,run_valid = -10,False
    def __init__(self, value): self.value = value
    def before_batch(self):
        if self.learn.iter != 1: return
        x = self.xb[0].clone()
        x[3,0,2,2] = self.value
        self.learn.xb = (x,)

@pytest.mark.parametrize('value,says', [(float('nan'), 'contain NaN'), (7., r'span \[.*7')])
def test_bad_images_are_found_before_the_step(value, says, make_learner, tiny_net, as_on_a_gpu):
    learn = make_learner(cbs=[AKDCallback(tiny_net(seed=1), attack=pgd), Spoiled(value)])
    with pytest.raises(ValueError, match=says):
        learn.fit(1, cbs=[was := AfterFirst()])
    assert all(torch.equal(p, q) for p,q in zip(learn.model.parameters(), was.params, strict=True))
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())

class AfterFirst(Callback):
    "The weights after the first batch"
    run_valid = False
    def after_step(self):
        if self.learn.iter == 0: self.params = [p.detach().clone() for p in self.model.parameters()]

class BadTeacher(nn.Module):
    "A teacher that returns NaN once it is told to"
    bad = False
    def __init__(self): super().__init__(); self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    def forward(self, x): return self.net(x)*(float('nan') if self.bad else 1.)

def test_a_teacher_without_numbers_is_found_before_the_step(make_learner, as_on_a_gpu):
    cb = AKDCallback(BadTeacher(), attack=pgd)
    class Break(Callback):
        order,run_valid = -10,False
        def before_batch(self): cb.teacher.members[0].model.bad = self.learn.iter == 1
    learn = make_learner(cbs=[cb, Break()])
    with pytest.raises(FloatingPointError, match='epoch 1, batch 2: `teacher` returned NaN .* for 32 of 32 images'):
        learn.fit(1, cbs=[was := AfterFirst()])
    assert all(torch.equal(p, q) for p,q in zip(learn.model.parameters(), was.params, strict=True))
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
    learn.remove_cb(Break)
    cb.teacher.members[0].model.bad = False
    learn.fit(1)
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_the_first_batch_is_checked_before_the_attack(make_learner, tiny_net, as_on_a_gpu):
    class Fails(PGD):
        def perturb(self, *args): raise AssertionError('the attack began')
    class Bad(Callback):
        order,run_valid = -10,False
        def before_batch(self): self.learn.xb = (self.xb[0]*255,)
    with pytest.raises(ValueError, match='divide 0–255 images by 255'):
        make_learner(cbs=[AdversarialTraining(Fails(.1)), Bad()]).fit(1)

def test_outside_a_step_values_are_checked_at_once(tiny_net, as_on_a_gpu):
    x,y = torch.rand(2, 1, 8, 8)*255,torch.tensor([1, 2])
    with pytest.raises(ValueError, match='divide 0–255'): PGD()(tiny_net().eval(), x, y)
    with core.checked_later() as checks: core.check_images(x)
    with pytest.raises(ValueError, match='divide 0–255'): checks[0]()
