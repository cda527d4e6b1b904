"What bad input gets: an error that names the argument, before anything has changed."
import re
from functools import partial
import pytest, torch, torch.nn as nn
from fastai.vision.all import (BCEWithLogitsLossFlat, DataBlock, ImageBlock, MSELossFlat, MultiCategoryBlock, PILImageBW,
                               RegressionBlock, Transform, TensorImage, resnet18)

from rkd_fastai import models
from rkd_fastai.all import *

methods = ['akd', 'rslad', 'ard', 'ckd']
callbacks = dict(akd=AKDCallback, rslad=RSLADCallback, ard=ARDCallback, ckd=CKDCallback)
each = pytest.mark.parametrize('method', methods)

@pytest.fixture
def unchanged(make_learner, make_dls, tiny_net, snapshot):
    "Context: a call on a Learner raises `error` and leaves it, its weights and its method as they were"
    from contextlib import contextmanager
    @contextmanager
    def check(learn, error, match):
        weights, cbs, lf, opt = snapshot.take(learn.model)[0], list(learn.cbs), learn.loss_func, learn.opt
        tfms = [list(dl.after_batch.fs) for dl in learn.dls.loaders]
        requires = [p.requires_grad for p in learn.model.parameters()]
        with pytest.raises(error, match=match): yield learn
        assert list(learn.cbs) == cbs and learn.loss_func is lf
        assert [list(dl.after_batch.fs) for dl in learn.dls.loaders] == tfms
        assert all(torch.equal(v, weights[k]) for k,v in learn.model.state_dict().items())
        assert [p.requires_grad for p in learn.model.parameters()] == requires
        assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
    return check

def both_ways(unchanged, learn, teacher, method, error, match):
    "By `to_rkd`, at once, and by `add_cb`, when the fit starts"
    with unchanged(learn, error, match): learn.to_rkd(teacher, method=method)
    cb = callbacks[method](teacher); learn.add_cb(cb)
    with unchanged(learn, error, match): learn.fit(1)
    learn.remove_cb(cb)

@each
def test_teacher_with_other_classes(method, unchanged, make_learner, tiny_net):
    both_ways(unchanged, make_learner(), tiny_net(n_out=7), method, ValueError, '`teacher`.*7 classes.*10')
    with pytest.raises(ValueError, match='`teacher`'): rkd_learner(make_learner().dls, tiny_net(), tiny_net(n_out=7), method=method)

@each
def test_teacher_of_other_images(method, unchanged, make_learner, tiny_net):
    both_ways(unchanged, make_learner(), tiny_net(n_in=3), method, ValueError, '`teacher`')
    both_ways(unchanged, make_learner(), nn.Sequential(nn.Flatten(), nn.Linear(100, 10)), method, ValueError, '`teacher`')

class NaN(nn.Module):
    def forward(self, x): return x.flatten(1)[:,:10]*float('nan')
@each
def test_teacher_that_returns_nan(method, unchanged, make_learner):
    both_ways(unchanged, make_learner(), NaN(), method, ValueError, '`teacher`.*NaN')

class LaterNaN(nn.Module):
    "NaN from the third call on"
    def __init__(self): super().__init__(); self.n = 0
    def forward(self, x): self.n += 1; return x.flatten(1)[:,:10]*(float('nan') if self.n > 2 else 1)
@each
def test_teacher_that_returns_nan_later(method, make_learner):
    "An error, not a student of NaN weights"
    learn = make_learner(cbs=callbacks[method](LaterNaN()))
    with pytest.raises(ValueError, match='`teacher`.*NaN'): learn.fit(3)
    assert all(p.isfinite().all() for p in learn.model.parameters())

@each
@pytest.mark.parametrize('bad', [-.1, 1.1, float('nan')])
def test_alpha_and_lam(method, bad, unchanged, make_learner, make_dls, tiny_net):
    for name in dict(akd=['alpha'], ckd=['lam']).get(method, ['alpha', 'lam']):
        with pytest.raises(ValueError, match=f'`{name}`'): callbacks[method](tiny_net(), **{name: bad})
        with unchanged(make_learner(), ValueError, f'`{name}`') as learn: learn.to_rkd(tiny_net(), method=method, **{name: bad})
    for name in ('alpha', 'lam'): # the factory checks what it is given, whether or not the method has use for it
        with pytest.raises(ValueError, match=f'`{name}`'): rkd_learner(make_dls(), tiny_net(), tiny_net(), method=method, **{name: bad})

@each
def test_T(method, unchanged, make_learner, tiny_net):
    with unchanged(make_learner(), ValueError, '`T`') as learn: learn.to_rkd(tiny_net(), method=method, T=0.)

@pytest.mark.parametrize('betas', [[.5], [.6, .6], [1.5, -.5]])
def test_betas(betas, tiny_net):
    with pytest.raises(ValueError, match='`betas`'): Teacher([tiny_net(), tiny_net()], betas=betas)

@pytest.mark.parametrize('cls', [PGD, FGSM, FFGSM, AutoAttack])
def test_eps_on_the_0_255_scale(cls):
    with pytest.raises(ValueError, match='`eps`.*8/255'): cls(8)

def test_unknown_method(unchanged, make_learner, make_dls, tiny_net):
    for bad in ('AKD', 'trades', '', None):
        with unchanged(make_learner(), ValueError, '(?s)`method`.*akd.*rslad.*ard.*ckd') as learn: learn.to_rkd(tiny_net(), method=bad)
        with pytest.raises(ValueError, match='`method`'): rkd_learner(make_dls(), tiny_net(), tiny_net(), method=bad)

@each
def test_no_teacher(method, unchanged, make_learner):
    with unchanged(make_learner(), ValueError, '`teacher`') as learn: learn.to_rkd([], method=method)
    for bad in (None, 'teacher.pth', [None]):
        with unchanged(make_learner(), TypeError, '`teacher`') as learn: learn.to_rkd(bad, method=method)

@pytest.mark.parametrize('bad', ['pgd', PGD, 8/255])
def test_what_is_no_attack(bad, unchanged, make_learner, make_dls, tiny_net):
    "An attack's name or class, given for an attack, is found out at once"
    with pytest.raises(TypeError, match='`attack`'): AdversarialTraining(bad)
    with pytest.raises(TypeError, match='`attack`'): RobustAccuracy(bad)
    with unchanged(make_learner(), TypeError, '`attack`') as learn: learn.to_adversarial(bad)
    with unchanged(make_learner(), TypeError, '`attack`') as learn: learn.to_rkd(tiny_net(), attack=bad)

def test_beta_decay_every():
    with pytest.raises(ValueError, match='`beta`'): TRADES(beta=-1)
    for bad in (-.1, 1., 2.):
        with pytest.raises(ValueError, match='`decay`'): WeightAveraging(bad)
    with pytest.raises(ValueError, match='`every`'): KeepEpochs(0)


# --- DataLoaders ---

def block_dls(block, get_y, tmp_path):
    import numpy as np
    from fastai.vision.all import Image
    for i in range(12): Image.fromarray(np.full((8, 8), 20*i, dtype=np.uint8)).save(tmp_path/f'{i}.png')
    return DataBlock((ImageBlock(PILImageBW), block), get_items=lambda p: sorted(p.glob('*.png')), get_y=get_y).dataloaders(tmp_path, bs=4, num_workers=0)

@pytest.mark.parametrize('kind', ['multi-label', 'regression', 'regression of several'])
@pytest.mark.parametrize('how', ['akd', 'adversarial', 'robustness', 'factory', 'callback'])
def test_no_single_label(kind, how, unchanged, make_learner, tiny_net, tmp_path):
    block, get_y, lf = {'multi-label': (MultiCategoryBlock(vocab=list('abcdefghij')), lambda o: ['a', 'b'], BCEWithLogitsLossFlat()),
                        'regression': (RegressionBlock(), lambda o: float(o.stem), MSELossFlat()),
                        'regression of several': (RegressionBlock(n_out=10), lambda o: [float(o.stem)]*10, MSELossFlat())}[kind]
    learn = make_learner(block_dls(block, get_y, tmp_path), tiny_net(), loss_func=lf)
    match = '`dls`.*one class'
    if how == 'factory':
        with pytest.raises(ValueError, match=match): rkd_learner(learn.dls, tiny_net(), tiny_net())
        return
    if how == 'callback': learn.add_cb(AKDCallback(tiny_net()))
    with unchanged(learn, ValueError, match):
        dict(akd=lambda: learn.to_rkd(tiny_net()), adversarial=lambda: learn.to_adversarial(), robustness=lambda: learn.robustness(('clean',)),
             callback=lambda: learn.fit(1))[how]()

class Shift(Transform):
    "Leaves [0, 1], after everything"
    order = 200
    def encodes(self, x: TensorImage): return x*3 - 1

@pytest.mark.parametrize('how', ['adversarial', 'rkd', 'robustness', 'metric'])
def test_images_outside_0_1(how, unchanged, make_learner, make_dls, tiny_net):
    dls = make_dls(); dls.add_tfms([Shift()], 'after_batch')
    learn = make_learner(dls, metrics=RobustAccuracy() if how == 'metric' else None)
    if how == 'adversarial': learn.add_cb(AdversarialTraining())
    if how == 'rkd': learn.add_cb(AKDCallback(tiny_net()))
    with unchanged(learn, ValueError, r'(?s)\[0, 1\].*span \[-1, 2\]'):
        dict(robustness=lambda: learn.robustness(('clean',)), metric=learn.validate).get(how, lambda: learn.fit(1))()

def test_images_normalised_by_hand(unchanged, make_learner, make_dls):
    "Normalised in a transform that is not fastai's Normalize, the statistics are not known"
    class ByHand(Transform):
        order = 200
        def encodes(self, x: TensorImage): return (x-.5)/.25
    dls = make_dls(); dls.add_tfms([ByHand()], 'after_batch')
    with unchanged(make_learner(dls, cbs=AdversarialTraining()), ValueError, 'Normalize') as learn: learn.fit(1)

def test_factory_leaves_dls_alone_on_error(make_dls, tiny_net):
    "`vision_learner` adds a Normalize to the DataLoaders: not before the teacher has been checked"
    dls = make_dls(channels=3); tfms = list(dls.after_batch.fs)
    with pytest.raises(ValueError, match='teacher'): rkd_learner(dls, resnet18, tiny_net(n_in=3, n_out=7), weights=None, pretrained=False)
    assert list(dls.after_batch.fs) == tfms

def test_factory_refuses_what_a_network_has_no_use_for(make_dls, tiny_net):
    with pytest.warns(UserWarning, match='pretrained.*stays as it is'): rkd_learner(make_dls(), tiny_net(), tiny_net(), pretrained=True)
    rkd_learner(make_dls(), tiny_net(), tiny_net(), pretrained=False) # as it is for every `arch`

def test_arguments_of_another_method(unchanged, make_learner, make_dls, tiny_net):
    for method,wrong in (('ckd', dict(alpha=.5)), ('akd', dict(lam=.5)), ('akd', dict(alhpa=.5)), ('akd', dict(alhpa=None))):
        with unchanged(make_learner(), TypeError, f'`{next(iter(wrong))}` means nothing to {method.upper()}Callback, which takes') as learn: learn.to_rkd(tiny_net(), method, **wrong)
    for method,wrong in (('ckd', dict(attack=PGD())), ('akd', dict(cache=True))): # asked for, where `alpha` may be a default
        with pytest.raises(TypeError, match=f'`{next(iter(wrong))}` means nothing to {method.upper()}Callback'): rkd_learner(make_dls(), tiny_net(), tiny_net(), method, **wrong)
    assert rkd_learner(make_dls(), tiny_net(), tiny_net(), 'rslad', cache=True).cbs[-1].cache
    assert repr(make_learner().to_rkd(tiny_net(), attack=None).cbs[-1].attack) == repr(PGD())

@pytest.mark.parametrize('wrong', [dict(eps=4/255), dict(steps=3), dict(norm='L2')])
def test_settings_of_the_attack(wrong, unchanged, make_learner, make_dls, tiny_net):
    "Which a user is tempted to give to the method"
    name, = wrong
    found = re.escape(f"`{name}` is a setting of the attack: give `attack=PGD({name}=…)`")
    with unchanged(make_learner(), TypeError, found) as learn: learn.to_adversarial(**wrong)
    with unchanged(make_learner(), TypeError, found) as learn: learn.to_rkd(tiny_net(), **wrong)
    with pytest.raises(TypeError, match=found): rkd_learner(make_dls(), tiny_net(), tiny_net(), **wrong)
    for cls in (AdversarialTraining, TRADES):
        with pytest.raises(TypeError, match=found): cls(**wrong)
    for cls in (AKDCallback, RSLADCallback, ARDCallback):
        with pytest.raises(TypeError, match=found): cls(tiny_net(), **wrong)
    for cls in (CKDCallback, lambda t, **k: RobustCallback(**k)): # which attack nothing
        with pytest.raises(TypeError, match=f'`{name}` means nothing to (CKD|Robust)Callback, which takes'): cls(tiny_net(), **wrong)

@pytest.mark.parametrize('name,make', [('eps', lambda v: PGD(v)), ('eps', lambda v: FGSM(v)), ('eps', lambda v: FFGSM(v)), ('eps', lambda v: AutoAttack(eps=v)), ('steps', lambda v: PGD(steps=v)),
                                       ('alpha', lambda v: AKDCallback(nn.Flatten(), v)), ('lam', lambda v: RSLADCallback(nn.Flatten(), lam=v)), ('T', lambda v: AKDCallback(nn.Flatten(), T=v))])
@pytest.mark.parametrize('value', ['8/255', None, [.1]])
def test_what_is_no_number(name, make, value):
    "Such as a fraction in quotes, which the command line takes"
    with pytest.raises(TypeError, match=f'`{name}` must be a number, got .*{"quotes" if value == "8/255" else ""}'): make(value)

@pytest.mark.parametrize('arch', [models.resnet18, models.wide_resnet, partial(models.resnet18, width=1/16)])
def test_a_function_that_is_no_architecture(arch, make_dls, tiny_net):
    "Ours return a network for a number of classes; `vision_learner`'s take `pretrained`"
    with pytest.raises(TypeError, match=rf"{getattr(arch, 'func', arch).__name__}\(n_out=dls.c\).*`models.resnet18`"): rkd_learner(make_dls(), arch, tiny_net(), pretrained=False)

def test_one_class(unchanged, make_learner, make_dls, tiny_net):
    "Nothing to tell it from: 100 % under any attack would be no merit"
    learn = make_learner(make_dls(n=8, n_valid=4, bs=4, n_classes=1), tiny_net(n_out=1))
    for what in (lambda l: l.to_adversarial(), lambda l: l.to_rkd(tiny_net(n_out=1)), lambda l: l.robustness(('clean',))):
        with unchanged(learn, ValueError, '`dls` have one class'): what(learn)

def test_teachers_with_classes_in_another_order(make_dls, make_learner, tiny_net):
    one,other = (Teacher(make_learner(make_dls(), tiny_net(seed=i))) for i in (1, 2))
    assert Teacher([one, other]).vocab == one.vocab
    other.vocab = [str(o) for o in one.vocab] # as checkpoints' cards have them
    Teacher([one, other])
    other.vocab = other.vocab[::-1]
    with pytest.raises(ValueError, match='order the classes differently'): Teacher([one, other])

def test_one_is_no_plural(make_learner, make_dls, capsys):
    "In errors, progress lines and results"
    from rkd_fastai.terminal import one_line
    for f in (lambda x, y: akd_loss(torch.zeros(2, 3), torch.full((2, 3), 1/3), y), lambda x, y: robust_accuracy(nn.Flatten(), x, y), lambda x, y: PGD(.1)(nn.Flatten(), x, y)):
        with pytest.raises(ValueError, match='`targ` has 1 label for 2 '): f(torch.rand(2, 1, 8, 8), torch.tensor([0]))
    learn = make_learner(make_dls(n=64))
    with one_line(learn, 'training'): learn.fit(1)
    assert re.search(r' 1 epoch\b', capsys.readouterr().out) and '1 image, Linf' in str(learn.robustness(('clean',), n=1))
