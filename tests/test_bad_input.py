"What bad input gets: an error that names the argument, before anything has changed."
import json, re
from functools import partial
import numpy as np, pytest, torch, torch.nn as nn
from fastai.vision.all import (BCEWithLogitsLossFlat, DataBlock, ImageBlock, MSELossFlat, MultiCategoryBlock,
                               PILImageBW, RegressionBlock, Transform, TensorImage, resnet18)

from rkd_fastai import models
from rkd_fastai.all import *
from rkd_fastai.callback.adversarial import RobustCallback
from rkd_fastai.core import are_probs, LogProbs
from rkd_fastai.evaluation.interpret import robustness_curve
from rkd_fastai.evaluation.robustness import measure_robustness

methods = ['akd', 'rslad', 'ard', 'ckd']
callbacks = dict(akd=AKDCallback, rslad=RSLADCallback, ard=ARDCallback, ckd=CKDCallback)
each = pytest.mark.parametrize('method', methods)

@pytest.fixture
def unchanged(make_learner, make_dls, tiny_net, snapshot):
    "Context: a call on a Learner raises `error` and leaves it, its weights and its method as they were"
    from contextlib import contextmanager
    @contextmanager
    def check(learn, error, match):
        weights, cbs, lf = snapshot.take(learn.model)[0], list(learn.cbs), learn.loss_func
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
    with pytest.raises(ValueError, match='`teacher`'):
        rkd_learner(make_learner().dls, tiny_net(), tiny_net(n_out=7), method=method)

@each
def test_teacher_of_other_images(method, unchanged, make_learner, tiny_net):
    both_ways(unchanged, make_learner(), tiny_net(n_in=3), method, ValueError, '`teacher`')
    both_ways(unchanged, make_learner(), nn.Sequential(nn.Flatten(), nn.Linear(100, 10)), method,
              ValueError, '`teacher`')

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
        with unchanged(make_learner(), ValueError, f'`{name}`') as learn:
            learn.to_rkd(tiny_net(), method=method, **{name: bad})
    for name in ('alpha', 'lam'): # the factory checks what it is given, whether or not the method has use for it
        with pytest.raises(ValueError, match=f'`{name}`'):
            rkd_learner(make_dls(), tiny_net(), tiny_net(), method=method, **{name: bad})

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
        with unchanged(make_learner(), ValueError, '(?s)`method`.*akd.*rslad.*ard.*ckd') as learn:
            learn.to_rkd(tiny_net(), method=bad)
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
    return DataBlock((ImageBlock(PILImageBW), block), get_items=lambda p: sorted(p.glob('*.png')),
                     get_y=get_y).dataloaders(tmp_path, bs=4, num_workers=0)

@pytest.mark.parametrize('kind', ['multi-label', 'regression', 'regression of several'])
@pytest.mark.parametrize('how', ['akd', 'adversarial', 'robustness', 'factory', 'callback'])
def test_no_single_label(kind, how, unchanged, make_learner, tiny_net, tmp_path):
    block, get_y, lf = {'multi-label': (MultiCategoryBlock(vocab=list('abcdefghij')), lambda o: ['a', 'b'],
                                        BCEWithLogitsLossFlat()),
                        'regression': (RegressionBlock(), lambda o: float(o.stem), MSELossFlat()),
                        'regression of several': (RegressionBlock(n_out=10), lambda o: [float(o.stem)]*10,
                                                  MSELossFlat())}[kind]
    learn = make_learner(block_dls(block, get_y, tmp_path), tiny_net(), loss_func=lf)
    match = '`dls`.*one class'
    if how == 'factory':
        with pytest.raises(ValueError, match=match): rkd_learner(learn.dls, tiny_net(), tiny_net())
        return
    if how == 'callback': learn.add_cb(AKDCallback(tiny_net()))
    with unchanged(learn, ValueError, match):
        dict(akd=lambda: learn.to_rkd(tiny_net()), adversarial=lambda: learn.to_adversarial(),
             robustness=lambda: learn.robustness(('clean',)), callback=lambda: learn.fit(1))[how]()

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

class Upscale(Transform):
    "To twice the size, which overshoots"
    order = 200
    def encodes(self, x: TensorImage):
        return TensorImage(torch.nn.functional.interpolate(x.as_subclass(torch.Tensor), scale_factor=2, mode='bicubic'))

@pytest.mark.parametrize('how', ['adversarial', 'rkd', 'robustness', 'metric'])
def test_overshoot_of_a_resize(how, make_learner, make_dls):
    """Images are clamped, and it is said; normalised ones that stay near [0, 1] are an error, and so is it for an
    attack itself"""
    dls,net = make_dls(), nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64, 10))
    dls.add_tfms([Upscale()], 'after_batch')
    x = dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    assert x.min() < -.05 and x.max() > 1.05
    learn = make_learner(dls, net, metrics=RobustAccuracy(PGD(.1, steps=1)) if how == 'metric' else None)
    if how == 'adversarial': learn.to_adversarial(PGD(.1, steps=1))
    run = dict(robustness=lambda l: l.robustness('pgd2', .1), metric=lambda l: l.validate(),
               rkd=lambda l: l.to_rkd(Teacher(net), attack=PGD(.1, steps=1)).fit(1)).get(how, lambda l: l.fit(1))
    with pytest.warns(UserWarning, match='slightly outside'): run(learn)
    with pytest.raises(ValueError, match=r'\[0, 1\].*bicubic.*clamp'): PGD()(net, x, torch.zeros(len(x)).long())
    dls.add_tfms([Darken()], 'after_batch')
    with pytest.raises(ValueError, match='are they normalised'): run(learn)

class Darken(Transform):
    "Subtracts a mean"
    order = 300
    def encodes(self, x: TensorImage): return x.clamp(0, 1) - .3

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
    with pytest.raises(ValueError, match='teacher'):
        rkd_learner(dls, resnet18, tiny_net(n_in=3, n_out=7), weights=None, pretrained=False)
    assert list(dls.after_batch.fs) == tfms

def test_factory_refuses_what_a_network_has_no_use_for(make_dls, tiny_net):
    with pytest.warns(UserWarning, match='pretrained.*stays as it is'):
        rkd_learner(make_dls(), tiny_net(), tiny_net(), pretrained=True)
    rkd_learner(make_dls(), tiny_net(), tiny_net(), pretrained=False) # as it is for every `arch`

def test_arguments_of_another_method(unchanged, make_learner, make_dls, tiny_net):
    for method,wrong in (('ckd', dict(alpha=.5)), ('akd', dict(lam=.5)), ('akd', dict(alhpa=.5)),
                         ('akd', dict(alhpa=None))):
        with unchanged(make_learner(), TypeError, f'`{next(iter(wrong))}` is not an argument of '
                                                  f'{method.upper()}Callback, which takes') as learn:
            learn.to_rkd(tiny_net(), method, **wrong)
    for method,wrong in (('ckd', dict(attack=PGD())), ('akd', dict(cache=True)), ('akd', dict(lam=.5)),
                         ('ckd', dict(alpha=.5))): # asked for, and no default
        with pytest.raises(TypeError, match=f'`{next(iter(wrong))}` is not an argument of {method.upper()}Callback'):
            rkd_learner(make_dls(), tiny_net(), tiny_net(), method, **wrong)
    assert rkd_learner(make_dls(), tiny_net(), tiny_net(), 'rslad', cache=True).cbs[-1].cache
    assert (rkd_learner(make_dls(), tiny_net(), tiny_net(), 'akd', lam=5/6).cbs[-1].alpha == .8
            and rkd_learner(make_dls(), tiny_net(), tiny_net(), 'ckd', lam=.5).cbs[-1].lam == .5)
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
        with pytest.raises(TypeError, match=f'`{name}` is not an argument of (CKD|Robust)Callback, which takes'):
            cls(tiny_net(), **wrong)

@pytest.mark.parametrize('name,make', [('eps', lambda v: PGD(v)), ('eps', lambda v: FGSM(v)),
                                       ('eps', lambda v: FFGSM(v)), ('eps', lambda v: AutoAttack(eps=v)),
                                       ('steps', lambda v: PGD(steps=v)),
                                       ('alpha', lambda v: AKDCallback(nn.Flatten(), v)),
                                       ('lam', lambda v: RSLADCallback(nn.Flatten(), lam=v)),
                                       ('T', lambda v: AKDCallback(nn.Flatten(), T=v)),
                                       ('restarts', lambda v: PGD(restarts=v)), ('bs', lambda v: AutoAttack(bs=v)),
                                       ('beta', lambda v: TRADES(beta=v)), ('decay', WeightAveraging),
                                       ('betas', lambda v: Teacher([nn.Flatten(), nn.Flatten()], betas=[v, .5])),
                                       ('decay', ExpDecay), ('pct_start', OneCycle),
                                       ('width', lambda v: models.resnet18(width=v)), ('n_out', models.resnet18),
                                       ('bs', lambda v: digits_dls(v)),
                                       ('valid_pct', lambda v: digits_dls(valid_pct=v)),
                                       ('frac', lambda v: with_label_noise(digits_dls(), v)),
                                       ('bs', lambda v: with_bs(digits_dls(), v)),
                                       ('eps', recipes.paper_teacher.at_eps)])
@pytest.mark.parametrize('value', ['8/255', None, [.1], torch.tensor([.1,.1]), np.array([.1,.1]), True], ids=str)
def test_what_is_no_number(name, make, value):
    "Such as a fraction in quotes, which the command line takes"
    with pytest.raises(TypeError, match=f'`{name}` must be a number, got '
                                        f'.*{"quotes" if isinstance(value, str) else ""}'):
        make(value)

@pytest.mark.parametrize('name,make', [
    ('steps', lambda v: PGD(steps=v)), ('restarts', lambda v: PGD(restarts=v)),
    ('bs', lambda v: AutoAttack(bs=v)), ('queries', lambda v: AutoAttack(queries=v)),
    ('seed', lambda v: AutoAttack(seed=v)), ('every', KeepEpochs), ('n_out', lambda v: wide_resnet(10, 1, n_out=v)),
    ('bs', lambda v: digits_dls(bs=v)), ('seed', lambda v: digits_dls(seed=v)), ('bs', lambda v: with_bs(None, v)),
    ('bs', lambda v: robust_accuracy(nn.Flatten(), torch.rand(2,1,2,2), torch.zeros(2).long(), PGD(), v))])
def test_what_is_no_whole_number(name, make):
    for bad in (2.5, float('nan'), float('inf')):
        with pytest.raises(ValueError, match=f'`{name}` must be a whole number'): make(bad)
    with pytest.raises(TypeError, match=f'`{name}` must be a number'): make('8')

@pytest.mark.parametrize('num,whole', [(np.float64, np.int64), (np.float32, np.float32), (torch.tensor, torch.tensor),
                                       (np.array, np.array), (lambda v: torch.tensor([v]), float)],
                         ids=['numpy', 'float32', 'torch', 'array', 'of one'])
def test_numbers_of_numpy_and_pytorch(num, whole, make_learner, make_dls, tiny_net, tmp_path):
    "They are Python's wherever they are kept, and give what Python's give"
    plain = lambda o: all(type(v) in (int, float, str, bool) for v in o.settings.values())
    for attack,same in ((PGD(num(.5), whole(5), num(.25), random_start=num(.5)), PGD(.5, 5, .25, random_start=.5)),
                        (PGD(num(.5), restarts=whole(2)), PGD(.5, restarts=2)),
                        (FFGSM(num(.5), num(.5)), FFGSM(.5, .5)),
                        (AutoAttack(num(.5), seed=whole(1), bs=whole(8), queries=whole(9)),
                         AutoAttack(.5, seed=1, bs=8, queries=9))):
        assert plain(attack) and repr(attack) == repr(same)
    learn,dls = make_learner(),make_dls()
    r = learn.robustness('pgd2', num(.125), seed=whole(1), bs=whole(40), state_path=tmp_path/'state.json')
    assert (json.loads(r.to_json())['eps'] == .125
            and r.pgd2 == learn.robustness('pgd2', .125, seed=1, bs=40, state_path=tmp_path/'state.json').pgd2)
    x,y,p = torch.rand(4,3), torch.tensor([0,1,2,0]), torch.rand(4,3).softmax(1)
    for loss,args in ((rslad_loss, (x,x,p,y,.5,.25,2.)), (ard_loss, (x,x,p,y,.5,.25,2.)), (akd_loss, (x,p,y,.5,2.)),
                      (ckd_loss, (x,p,y,.5,2.)), (trades_loss, (x,x,y,6.))):
        assert torch.equal(loss(*(num(v) if isinstance(v, float) else v for v in args)), loss(*args))
    cb = RSLADCallback(Teacher([tiny_net(), tiny_net()], betas=[num(.5), num(.5)]), num(.5), num(.25), T=num(2.))
    assert (cb.alpha, cb.lam, cb.T, cb.teacher.betas) == (.5, .25, 2., [.5, .5]) and type(cb.alpha) is float
    for make in (lambda n, f: with_subset(dls, n(40), seed=n(1)), lambda n, f: with_label_noise(dls, f(.5), seed=n(3)),
                 lambda n, f: with_bs(dls, n(8))):
        mine,theirs = make(whole, num),make(int, float)
        assert (mine.train.bs == theirs.train.bs
                and [int(y) for _,y in mine.train_ds] == [int(y) for _,y in theirs.train_ds])
    learn.add_cb(WeightAveraging(num(.5))); learn.fit_exp(whole(1), .1, num(.5))
    assert len(learn.recorder.values) == 1

def test_what_may_be_none_is_a_number_otherwise():
    for name,make in (('step_size', lambda v: PGD(step_size=v)), ('every', lambda v: Resume('x', every=v))):
        make(None)
        with pytest.raises(TypeError, match=f'`{name}` must be a number, got .*quotes'): make('8')
    for betas in (.5, '.5'):
        with pytest.raises(TypeError, match='`betas` must be a list of numbers'):
            Teacher([nn.Flatten(), nn.Flatten()], betas=betas)

@pytest.mark.parametrize('arch', [models.resnet18, models.wide_resnet, partial(models.resnet18, width=1/16)])
def test_a_function_that_is_no_architecture(arch, make_dls, tiny_net):
    "Ours return a network for a number of classes; `vision_learner`'s take `pretrained`"
    with pytest.raises(TypeError, match=rf"{getattr(arch, 'func', arch).__name__}\(n_out=dls.c\).*`models.resnet18`"):
        rkd_learner(make_dls(), arch, tiny_net(), pretrained=False)

def test_one_class(unchanged, make_learner, make_dls, tiny_net):
    "Nothing to tell it from: 100 % under any attack would be no merit"
    learn = make_learner(make_dls(n=8, n_valid=4, bs=4, n_classes=1), tiny_net(n_out=1))
    for what in (lambda l: l.to_adversarial(), lambda l: l.to_rkd(tiny_net(n_out=1)),
                 lambda l: l.robustness(('clean',))):
        with unchanged(learn, ValueError, '`dls` have one class'): what(learn)

def test_one_logit(unchanged, make_learner, make_dls, tiny_net):
    "All labels are 0, and any attack would leave every image standing"
    net,x,y = tiny_net(n_out=1),torch.rand(4,1,8,8),torch.zeros(4).long()
    learn = make_learner(make_dls(n_classes=2), net)
    for attack in (PGD(), FGSM(), AutoAttack(), PGD(objective='cw')):
        for what in (lambda: attack(net, x, y), lambda: robust_accuracy(net, x, y, attack)):
            with pytest.raises(ValueError, match='`model` returns 1 logit.*two classes'): what()
    for what in (lambda: learn.robustness('clean'), lambda: learn.check_robustness(),
                 lambda: robust_accuracy(learn, x, y)):
        with unchanged(learn, ValueError, '`model` returns 1 logit'): what()
    with pytest.raises(ValueError, match='`teacher` returns 1 logit'): Teacher(net).probs(x)
    two = nn.Sequential(net, Two())
    assert AutoAttack(.3)(two.eval(), x, two(x).argmax(1)).shape == x.shape # the way out

class Two(nn.Module):
    "The way out"
    def forward(self, z): return torch.cat([torch.zeros_like(z), z], 1)

def test_teachers_with_classes_in_another_order(make_dls, make_learner, tiny_net):
    one,other = (Teacher(make_learner(make_dls(), tiny_net(seed=i))) for i in (1, 2))
    assert Teacher([one, other]).vocab == one.vocab
    other.vocab = [str(o) for o in one.vocab] # as checkpoints' cards have them
    Teacher([one, other])
    other.vocab = other.vocab[::-1]
    with pytest.raises(ValueError, match='different orders of the classes.*Train all members with one'):
        Teacher([one, other])

takes_targ = dict(
    pgd=lambda m, x, t: PGD(.1, steps=1)(m, x, t),
    kl=lambda m, x, t: PGD(.1, steps=1, objective='kl')(m, x, t),
    cw=lambda m, x, t: PGD(.1, steps=1, objective='cw')(m, x, t),
    autoattack=lambda m, x, t: AutoAttack(.1, version='apgd-ce')(m, x, t),
    robust_accuracy=lambda m, x, t: robust_accuracy(m, x, t, lambda m, x, t: x),
    check_masking=lambda m, x, t: check_masking(m, x, t),
    soft_targets=lambda m, x, t: soft_targets(torch.full((16, 10), .1), t, .5),
    ckd=lambda m, x, t: ckd_loss(torch.zeros(16, 10), torch.full((16, 10), .1), t),
    trades=lambda m, x, t: trades_loss(torch.zeros(16, 10), torch.zeros(16, 10), t),
    akd=lambda m, x, t: akd_loss(torch.zeros(16, 10), torch.full((16, 10), .1), t))
no_targ = dict(
    floats=(lambda y: y.float(), ValueError, r'`(targ|y)` contains one torch.float32 per image, '
                                             r'but class indices are integers: use `(targ|y).long\(\)`'),
    halves=(lambda y: y.half(), ValueError, r'`(targ|y)` contains one torch.float16 per image.*`(targ|y).long\(\)`'),
    a_column=(lambda y: y[:,None], ValueError, r'`(targ|y)` must hold class indices \(bs,\).*shape \(16, 1\): '
                                               r'use `(targ|y).flatten\(\)`'),
    a_column_of_floats=(lambda y: y[:,None].float(), ValueError, r'soft `(targ|y)`.*\(16, 1\)'),
    one_number=(lambda y: torch.tensor(1), ValueError, r'`(targ|y)` must hold class indices'),
    a_list=(lambda y: y.tolist(), TypeError, r'`(targ|y)` must be a tensor of class indices .*got list: '
                                             r'use `torch.as_tensor'),
    an_array=(lambda y: y.numpy(), TypeError, r'`(targ|y)` must be a tensor of class indices .*got ndarray'))

@pytest.mark.parametrize('kind', no_targ)
@pytest.mark.parametrize('name', takes_targ)
def test_labels_that_are_none(name, kind, digits, robust_net):
    "Said before the network is asked, let alone attacked"
    def model(x): asked.append(x); return robust_net(x)
    asked, (make, error, says), (x, y) = [], no_targ[kind], (digits.x[:16], digits.y[:16])
    with pytest.raises(error, match=says): takes_targ[name](model, x, make(y))
    assert not asked

@pytest.mark.parametrize('attacks, says', [
    (32, "`attacks` takes names such as 'pgd20', got 32: for a number of images, pass it as `n`"),
    ((np.int64(32),), 'for a number of images'), (PGD(), 'pass an attack object to `RobustAccuracy`'),
    ('PGD-20', "unknown attack 'PGD-20' in `attacks`: use .*'pgd<steps>' such as 'pgd20'"), ('pgd', "such as 'pgd20'")])
def test_what_is_no_name_of_an_attack(attacks, says, make_dls, make_learner, tiny_net, test_images):
    learn = make_learner(make_dls(), tiny_net())
    with pytest.raises(ValueError, match=says): learn.robustness(attacks)
    with pytest.raises(ValueError, match=says): measure_robustness(learn.model, *test_images, attacks)

def test_classes_without_an_output(digits, robust_net):
    with pytest.raises(ValueError, match='`targ` contains classes .* has 10: give the network an output for each'):
        robust_accuracy(robust_net, digits.x[:16], digits.y[:16] + 10, PGD(0., steps=0))

def test_soft_labels_of_other_classes(digits, robust_net):
    "Their likeliest class is none of the model's: 100 % would mean nothing"
    x, y = digits.x[:16], digits.y[:16]
    with pytest.raises(ValueError, match=r'soft `targ` must be \(bs, 10\).*\(16, 12\)'):
        robust_accuracy(robust_net, x, torch.nn.functional.one_hot(y, 12).float(), PGD(0., steps=0))

# --- networks that end in a softmax ---

def softened(net): return nn.Sequential(net, nn.Softmax(1))

class InEvalMode(nn.Module):
    "Logits while it trains, probabilities when it is asked"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x) if self.training else self.net(x).softmax(1)

@each
@pytest.mark.parametrize('teacher', [softened, lambda net: Teacher([net, Teacher(softened(net))])],
                         ids=['alone','a member of a member'])
def test_teacher_that_ends_in_a_softmax(method, teacher, unchanged, make_learner, tiny_net):
    both_ways(unchanged, make_learner(), teacher(tiny_net()), method, ValueError,
              r'`teacher` returns probabilities, not logits.*`LogProbs\(net\)`')

@pytest.mark.parametrize('method', [*methods, 'at', 'trades'])
@pytest.mark.parametrize('student', [softened, InEvalMode])
def test_student_that_ends_in_a_softmax(method, student, unchanged, make_learner, tiny_net):
    "Said before the first step"
    cb = dict(at=AdversarialTraining, trades=TRADES).get(method) or partial(callbacks[method], tiny_net(seed=1))
    learn = make_learner(model=student(tiny_net()), cbs=cb())
    with unchanged(learn, ValueError, '`learn.model` returns probabilities, not logits'): learn.fit(1)

measures = dict(
    robust_accuracy = lambda l, x, y: robust_accuracy(l.model, x, y, PGD(.1, steps=1)),
    metric = lambda l, x, y: make_metric(l).validate(),
    robustness = lambda l, x, y: l.robustness('pgd1'),
    curve = lambda l, x, y: robustness_curve(l.model, x, y, [.1], 'pgd1'),
    masking = lambda l, x, y: check_masking(l.model, x, y),
    check_robustness = lambda l, x, y: l.check_robustness(),
    teacher = lambda l, x, y: Teacher(l.model).probs(x),
    teacher_check = lambda l, x, y: Teacher(l).check(l.dls, 'clean'),
    adversarial = lambda l, x, y: l.show_adversarial(max_n=2),
    trajectory = lambda l, x, y: l.fit(1, 0., cbs=RecordTrajectory(l.path/'t', attack=None)))
def make_metric(learn): learn.metrics = [*learn.metrics, RobustAccuracy(PGD(.1, steps=1))]; return learn

@pytest.mark.parametrize('measure', measures.values(), ids=measures)
def test_measuring_probabilities(measure, make_learner, make_dls, plain_net, test_images):
    x, y = (o[:40] for o in test_images)
    with pytest.raises(ValueError, match='returns probabilities, not logits'):
        measure(make_learner(model=softened(plain_net)), x, y)

def test_logits_that_are_logarithms(make_learner, make_dls, plain_net, test_images):
    "Of probabilities, they are logits as good as others: nothing is said, and the numbers are the network's own"
    x, y = (o[:40] for o in test_images)
    want = robust_accuracy(plain_net, x, y, PGD(.1, steps=3, random_start=False))
    for net in (nn.Sequential(plain_net, nn.LogSoftmax(1)), LogProbs(softened(plain_net))):
        assert abs(robust_accuracy(net, x, y, PGD(.1, steps=3, random_start=False)) - want) < .03 and 0 < want < 1
        torch.testing.assert_close(Teacher(net).probs(x), Teacher(plain_net).probs(x))
        make_learner(model=net, cbs=TRADES(PGD(.1, steps=1, objective='kl'))).fit(1, 0.)
    learn = make_learner().to_rkd(LogProbs(softened(plain_net)), attack=PGD(.1, steps=1))
    learn.fit(1, 0.)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert are_probs(torch.randn(9, 1000).softmax(1).to(dtype)) and not are_probs(torch.rand(9, 1000).to(dtype))
    same = torch.eye(10)[[3, 3]] # two images that a sure network answers alike
    assert Teacher(nn.Sequential(nn.Flatten(), nn.Identity())).probs(
        same.view(2, 1, 1, 10)).argmax(1).tolist() == [3, 3]

def test_attack_on_probabilities(plain_net, test_images):
    "A warning, once for each network"
    x, y, net = test_images[0][:10], test_images[1][:10], softened(plain_net)
    with pytest.warns(UserWarning, match='returns probabilities'): PGD(.1, steps=1)(net, x, y)
    PGD(.1, steps=1)(PixelModel(net), x, y); PGD(.1, steps=1)(plain_net, x, y)
def test_one_is_no_plural(make_learner, make_dls, capsys):
    "In errors, progress lines and results"
    from rkd_fastai.callback.progress import one_line
    for f in (lambda x, y: akd_loss(torch.zeros(2, 3), torch.full((2, 3), 1/3), y),
              lambda x, y: robust_accuracy(nn.Flatten(), x, y), lambda x, y: PGD(.1)(nn.Flatten(), x, y)):
        with pytest.raises(ValueError, match='`targ` has 1 label for 2 '): f(torch.rand(2, 1, 8, 8), torch.tensor([0]))
    learn = make_learner(make_dls(n=64))
    with one_line(learn, 'training'): learn.fit(1)
    assert (re.search(r' 1 epoch\b', capsys.readouterr().out)
            and '1 of 48 validation images' in str(learn.robustness(('clean',), n=1)))
