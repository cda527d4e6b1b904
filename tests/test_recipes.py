"""The recipes: their numbers are those of the sources, their steps those of the authors' scripts in plain PyTorch,
their schedules PyTorch's."""
import copy, math
from functools import partial
from types import SimpleNamespace

import numpy as np, pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.vision.all import (Callback, CrossEntropyLossFlat, CutMix, IntToFloatTensor, Normalize, ProgressCallback,
                               accuracy, load_learner)

from conftest import plain
from rkd_fastai.all import *
from rkd_fastai.recipes import *
from rkd_fastai.recipes import (ard_official, fast_at, kind_recipes, paper_student, paper_teacher, rebuffi_at_plus,
                                rslad_official, trades_official, wang_at_plus, wang_trades)
from rkd_fastai.schedules import Triangle, WarmupCosine, sgd

every = {**all_recipes, **{f'kind {k}': r for k,r in kind_recipes.items()}}
distilling = ['paper_student', 'rslad_official', 'ard_official']
each = pytest.mark.parametrize('name', every)

def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn
def teacher_of(recipe, tiny_net): return tiny_net(seed=7) if recipe.needs_teacher else None


# --- the numbers, as the sources have them ---

pgd7  = dict(kind='PGD', eps=8/255, steps=7, step_size=2/255, random_start=True, objective='ce')
pgd10 = pgd7 | dict(steps=10)
near  = dict(random_start=.001, objective='kl') # x + 0.001·N(0,1), climbing the KL
field = dict(wd=5e-4, bn_wd=True, nesterov=True, lr_bs=None, settings={}, mean_over_classes=False, ema=None,
             synthetic=None, cutout=0, cutmix=False, label_smoothing=0.)
at_plus = field | dict(method='at', attack=pgd10, epochs=400, bs=1024, lr=.4, lr_bs=1024, schedule=WarmupCosine(.025),
                       bn_wd=False, ema=.995, synthetic=.7, cutout=18)
edm = at_plus | dict(bs=512, lr=.2, lr_bs=512, cutout=0)
script = field | dict(bs=128, lr=.1, wd=2e-4, nesterov=False)
paper = field | dict(method='at', attack=pgd7, epochs=100, bs=128, lr=.1, schedule=ExpDecay(.9))
numbers = dict(
    paper_teacher=paper,
    paper_student=field | dict(method='akd', attack=pgd7, epochs=100, bs=256, lr=.21,
                               schedule=OneCycle(.3, 25., 2.5e5), settings=dict(alpha=.8)),
    rebuffi_at_plus=at_plus,
    wang_at_plus=edm,
    wang_trades=edm | dict(method='trades', attack=pgd10 | dict(objective='kl'), settings=dict(beta=5.),
                           label_smoothing=.1),
    rslad_official=script | dict(method='rslad', attack=pgd10 | near, epochs=300,
                                 schedule=Steps((215,260,285), 300, .1), settings=dict(alpha=1., lam=5/6),
                                 mean_over_classes=True),
    ard_official=script | dict(method='ard', attack=pgd10, epochs=200,
                               schedule=Steps((100,), 200, .1), settings=dict(alpha=1., lam=1., T=30.),
                               mean_over_classes=True),
    trades_official=script | dict(method='trades', attack=pgd10 | near | dict(eps=.031, step_size=.007), epochs=76,
                                  schedule=Steps((74,), 76, .1), settings=dict(beta=6.)),
    fast_at=field | dict(method='at', attack=pgd7 | dict(kind='FFGSM', steps=1, step_size=10/255), epochs=15, bs=128,
                         lr=.2, schedule=Triangle(.5), nesterov=False))
numbers |= {
    'kind st': paper | dict(method='st', attack=None),
    'kind at': paper,
    'kind lat': paper | dict(attack=pgd7 | dict(eps=2/255, step_size=.5/255)),
    'kind ffgsm': paper | dict(attack=pgd7 | dict(kind='FFGSM', steps=1, step_size=10/255)),
    'kind trades': paper | dict(method='trades', attack=pgd10 | dict(objective='kl'), settings=dict(beta=6.)),
    'kind at+': at_plus}

@each
def test_numbers(name):
    recipe, want = every[name], numbers[name].copy()
    attack = want.pop('attack')
    if attack is None: assert recipe.attack is None
    else:
        assert (type(recipe.attack).__name__ == attack['kind']
                and (recipe.attack.norm, recipe.attack.restarts) == ('Linf', 1))
        for k in ('eps', 'steps', 'step_size', 'random_start'):
            assert getattr(recipe.attack, k) == pytest.approx(attack[k]), k
        assert getattr(recipe.attack, 'objective', 'ce') == attack['objective']
        assert (recipe.attack.random_start is True) == (attack['random_start'] is True)
    assert {k: getattr(recipe, k) for k in want} == want
    assert recipe.needs_teacher == (name in distilling) and recipe.source

def test_no_recipe_is_untested(): assert set(numbers) == set(every)

@pytest.mark.parametrize('name, depth, act', [('rebuffi_at_plus', 28, nn.SiLU), ('wang_at_plus', 28, nn.SiLU),
                                              ('wang_trades', 28, nn.SiLU), ('trades_official', 34, nn.ReLU)])
def test_networks(name, depth, act):
    "WideResNet-28-10 with SiLU, TRADES a WideResNet-34-10 with ReLU; all others a ResNet-18"
    with torch.device('meta'): net = all_recipes[name].arch(n_out=10, n_in=3)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    # 6n+1 of the 6n+4 that give it its name
    assert len([c for c in convs if c.kernel_size == (3,3)]) == depth-3 and convs[-1].out_channels == 640
    assert {type(m) for m in net.modules() if isinstance(m, (nn.SiLU, nn.ReLU))} == {act}
    assert all(r.arch is cifar_resnet18 for k,r in all_recipes.items()
               if k not in ('rebuffi_at_plus','wang_at_plus','wang_trades','trades_official'))

@pytest.mark.parametrize('name, bs, n_classes, lr, wd', [
    ('paper_teacher', 16, None, .1, [5e-4]), ('paper_student', 16, None, .21, [5e-4]),
    ('rebuffi_at_plus', 32, None, .0125, [5e-4, 0.]), ('rebuffi_at_plus', 16, None, .00625, [5e-4, 0.]),
    ('wang_trades', 16, None, .00625, [5e-4, 0.]), ('rslad_official', 16, None, .01, [2e-3]),
    ('rslad_official', 32, 4, .025, [8e-4]), ('ard_official', 16, 5, .02, [1e-3]),
    ('trades_official', 16, None, .1, [2e-4]), ('fast_at', 16, None, .2, [5e-4])])
def test_rate_and_decay(name, bs, n_classes, lr, wd, make_dls, tiny_net):
    "In proportion to the batch where the source says so; by the number of classes where its loss is a mean over them"
    recipe, dls = all_recipes[name], make_dls(bs=bs, n_classes=n_classes)
    net = lambda seed: tiny_net(n_out=n_classes or 10, seed=seed)
    learn = quiet(recipe.learner(dls, net(0), teacher=net(7) if recipe.needs_teacher else None))
    assert recipe.lr_for(dls) == pytest.approx(lr)
    learn.create_opt()
    groups = learn.opt.opt.param_groups
    assert [g['weight_decay'] for g in groups] == pytest.approx(wd) and type(learn.opt.opt) is torch.optim.SGD
    assert {(g['momentum'], g['nesterov'], g['dampening']) for g in groups} == {(.9, recipe.nesterov, 0)}
    if len(wd) == 2: # BatchNorm's own scale and shift, and nothing else, are not decayed
        assert [p.data_ptr() for p in groups[1]['params']] == [p.data_ptr() for p in learn.model[1].parameters()]
        assert sum(len(g['params']) for g in groups) == 6


# --- some steps, against the authors' scripts written out ---

class Record(Callback):
    "What every training batch starts from; in `steps`"
    order,run_valid = 4,False # before the robust callbacks
    def before_fit(self): self.steps,self.start = [],copy.deepcopy(self.model)
    def before_batch(self):
        self.steps.append(SimpleNamespace(x=plain(self.x), y=plain(self.y), rng=torch.get_rng_state()))
class Outcome(Callback):
    "What the network is shown, and what comes of it"
    order,run_valid = 50,False
    def before_batch(self): self.record.steps[-1].seen = plain(self.x)
    def after_batch(self):
        vars(self.record.steps[-1]).update(after=copy.deepcopy(self.model.state_dict()),
                                           rng_after=torch.get_rng_state(), lr=self.opt.hypers[0]['lr'])

def climb(model, x, loss, start, eps=8/255, steps=10, step=2/255):
    "As the scripts have it: eval mode, sign of the gradient, back into the ball and into [0, 1]"
    was = [m.training for m in model.modules()]
    model.eval()
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        g, = torch.autograd.grad(loss(model(x_adv)), x_adv)
        x_adv = torch.min(torch.max(x_adv.detach() + step*g.sign(), x - eps), x + eps).clamp(0, 1)
    for m,mode in zip(model.modules(), was): m.training = mode
    return x_adv
def gauss(x): return x + .001*torch.randn(x.shape)
def uniform(x, eps=8/255): return (x + torch.empty(x.shape).uniform_(-eps, eps)).clamp(0, 1)
kl_sum = nn.KLDivLoss(reduction='sum')

def run(recipe, dls, net, teacher=None):
    record = Record()
    learn = quiet(recipe.learner(dls, net, teacher=teacher, cbs=[record, Outcome()]))
    recipe.fit(learn, 1)
    return learn, record

def check_steps(record, attack, loss, opt, lrs, each_step=lambda model: None):
    """Raise unless each step is `attack`, then `opt` on `loss(model, x′, x, y)`, at learning rates `lrs`; `opt`
    makes the optimiser"""
    model = record.start.train()
    opt = opt(model)
    assert len(record.steps) == len(lrs)
    for s,lr in zip(record.steps, lrs):
        torch.set_rng_state(s.rng)
        x_adv = attack(model, s.x, s.y)
        assert torch.equal(torch.get_rng_state(), s.rng_after) # no other random numbers than the script's
        # the sign of a vanishing gradient is anyone's
        assert ((x_adv - s.seen).abs() < 1e-5).float().mean() > .99 and not torch.equal(s.seen, s.x)
        for g in opt.param_groups: g['lr'] = lr
        opt.zero_grad(); loss(model, s.seen, s.x, s.y).backward(); opt.step() # on the very x′ that was seen
        for k,v in model.state_dict().items():
            torch.testing.assert_close(s.after[k], v, rtol=2e-5, atol=1e-6, msg=lambda m: f'{k}: {m}')
        each_step(model)
    return model

def sgd_of(wd, nesterov=False):
    return lambda model: torch.optim.SGD(model.parameters(), .1, momentum=.9, weight_decay=wd, nesterov=nesterov)

@pytest.mark.parametrize('n_classes', [None, 4])
def test_rslad_script(n_classes, make_dls, tiny_net):
    """A mean over batch and classes at 0.1 and 2e-4: with the equation's loss a tenth of the rate and ten times the
    decay"""
    net, native = tiny_net(n_out=n_classes or 10), tiny_net(n_out=n_classes or 10, seed=7).eval()
    _, record = run(all_recipes['rslad_official'], make_dls(n_classes=n_classes), net, native)
    probs = lambda x: native(x).softmax(1).detach()
    attack = lambda model, x, y: climb(model, x, lambda out: kl_sum(out.log_softmax(1), probs(x)), gauss(x))
    kl = nn.KLDivLoss(reduction='none')
    def loss(model, x_adv, x, y):
        adv = model(x_adv)
        nat = model(x)
        return 5/6*kl(adv.log_softmax(1), probs(x)).mean() + 1/6*kl(nat.log_softmax(1), probs(x)).mean()
    check_steps(record, attack, loss, sgd_of(2e-4), [.1]*3)

def test_ard_script(make_dls, tiny_net):
    """T=30, a mean over all elements; the clean pass has no weight in the loss, but BatchNorm sees it. Half-way the
    rate falls"""
    native = tiny_net(seed=7).eval()
    _, record = run(all_recipes['ard_official'], make_dls(), tiny_net(), native)
    attack = lambda model, x, y: climb(model, x, lambda out: F.cross_entropy(out, y, reduction='sum'), uniform(x))
    def loss(model, x_adv, x, y):
        adv, nat = model(x_adv), model(x)
        kl = F.kl_div((adv/30).log_softmax(1), (native(x)/30).softmax(1).detach(), reduction='none').mean()
        return 30*30*kl + 0.*F.cross_entropy(nat, y)
    check_steps(record, attack, loss, sgd_of(2e-4), [.1, .1, .01])

def trades_loss_of(beta, smoothing=0.):
    def loss(model, x_adv, x, y):
        adv, nat = model(x_adv), model(x)
        return (F.cross_entropy(nat, y, label_smoothing=smoothing)
                + beta/len(x)*kl_sum(adv.log_softmax(1), nat.softmax(1)))
    return loss
def from_own(start, **kw):
    "The attack of TRADES, away from the network's own clean output"
    def attack(model, x, y):
        with torch.no_grad(): p = copy.deepcopy(model).eval()(x).softmax(1)
        return climb(model, x, lambda out: kl_sum(out.log_softmax(1), p), start(x), **kw)
    return attack

@pytest.mark.parametrize('lifted', [True, False])
def test_trades_script(lifted, make_dls, tiny_net, digits):
    """The script on images off 0 and 1; where the start would leave [0, 1] it is clipped here, and only after the
    first step there"""
    dls = make_dls()
    if lifted:
        dls = arrays_dls(*[((digits.imgs[a:b]*.5 + 60).astype(np.uint8), digits.labels[a:b])
                           for a,b in ((0,96), (96,144))], bs=32)
    _, record = run(all_recipes['trades_official'], dls, tiny_net())
    check_steps(record, from_own(gauss if lifted else lambda x: gauss(x).clamp(0, 1), eps=.031, step=.007),
                trades_loss_of(6.), sgd_of(2e-4), [.1]*3)

def test_fast_script(make_dls, tiny_net):
    "FFGSM, a rate that starts from nothing and is back there at the end, no Nesterov"
    _, record = run(all_recipes['fast_at'], make_dls(n=128), tiny_net())
    attack = lambda model, x, y: climb(model, x, lambda out: F.cross_entropy(out, y), uniform(x), steps=1, step=10/255)
    check_steps(record, attack, lambda model, x_adv, x, y: F.cross_entropy(model(x_adv), y),
                sgd_of(5e-4), [0., .1, .2, .1])

def wa_opt(model):
    "`train-wa.py`: BatchNorm's parameters in a group without weight decay, Nesterov"
    bn = [*model[1].parameters()]
    return torch.optim.SGD([dict(params=[p for p in model.parameters() if not any(p is b for b in bn)]),
                            dict(params=bn, weight_decay=0.)], .1, momentum=.9, weight_decay=5e-4, nesterov=True)
def wa_rates(top, n):
    return [top*(min(i/n/.025, 1.) if i/n < .025 else .5*(1 + math.cos(math.pi*(i/n - .025)/.975))) for i in range(n)]

@pytest.mark.parametrize('name, top, smoothing', [('rebuffi_at_plus', .4*32/1024, 0.), ('wang_at_plus', .2*32/512, 0.),
                                                  ('wang_trades', .2*32/512, .1)])
def test_weight_averaging_scripts(name, top, smoothing, make_dls, tiny_net):
    "Steps as of the script; what is left is the average with its ramp, and BatchNorm's statistics by value"
    learn, record = run(all_recipes[name], make_dls(n=128), tiny_net())
    if name == 'wang_trades': attack, loss = from_own(uniform), trades_loss_of(5., smoothing)
    else:
        attack = lambda model, x, y: climb(
            model, x, lambda out: F.cross_entropy(out, y, label_smoothing=smoothing), uniform(x))
        loss = lambda model, x_adv, x, y: F.cross_entropy(model(x_adv), y, label_smoothing=smoothing)
    ema, params = copy.deepcopy(record.start.state_dict()), {k for k,_ in record.start.named_parameters()}
    t = iter(range(99))
    def average(model):
        i = next(t)
        d = min(.995, (1+i)/(10+i))
        for k,v in model.state_dict().items(): ema[k] = d*ema[k] + (1-d)*v.clone() if k in params else v.clone()
    raw = check_steps(record, attack, loss, wa_opt, wa_rates(top, 4), average)
    assert top > record.steps[1].lr > record.steps[3].lr > 0 == record.steps[0].lr
    for k,v in learn.model.state_dict().items():
        torch.testing.assert_close(v, ema[k], rtol=2e-5, atol=1e-6, msg=lambda m: f'{k}: {m}')
    assert not torch.allclose(raw[0].weight, learn.model[0].weight, atol=1e-5)

def test_paper_student_steps(make_dls, tiny_net):
    "AKD⁺ at α=.8: one cross-entropy at x′, of the teacher at x′ too; OneCycle, Nesterov"
    native = tiny_net(seed=7).eval()
    _, record = run(all_recipes['paper_student'], make_dls(n=128), tiny_net(), native)
    attack = lambda model, x, y: climb(
        model, x, lambda out: F.cross_entropy(out, y, reduction='sum'), uniform(x), steps=7)
    def loss(model, x_adv, x, y):
        return F.cross_entropy(model(x_adv), .8*native(x_adv).softmax(1).detach() + .2*F.one_hot(y, 10))
    cos = lambda a, b, pct: b + (a-b)/2*(1 + math.cos(math.pi*pct))
    check_steps(record, attack, loss, sgd_of(5e-4, True),
                [.21/25, cos(.21/25, .21, .25/.3), cos(.21, .21/2.5e5, .2/.7), cos(.21, .21/2.5e5, .45/.7)])

def test_standard_training_is_fastais(make_dls, tiny_net):
    "`st` attacks nothing: clean cross-entropy"
    _, record = run(kind_recipes['st'], make_dls(), tiny_net())
    model = record.start.train()
    opt = sgd_of(5e-4, True)(model)
    for s in record.steps:
        assert torch.equal(s.seen, s.x) and torch.equal(s.rng, s.rng_after)
        opt.zero_grad(); F.cross_entropy(model(s.x), s.y).backward(); opt.step()
    for k,v in model.state_dict().items():
        torch.testing.assert_close(record.steps[-1].after[k], v, rtol=2e-5, atol=1e-6)


# --- schedules, against PyTorch's ---

class Rates(Callback):
    "Learning rates of each step's parameter groups"
    run_valid,order = False,60
    def before_fit(self): self.used = []
    def after_pred(self): self.used.append([g['lr'] for g in self.opt.opt.param_groups])

def rates_of(make_learner, n_epoch, lr, sched, splitter=None, **kw):
    learn = make_learner(opt_func=sgd, **({} if splitter is None else dict(splitter=splitter))) # three batches an epoch
    assert learn.fit_sched(n_epoch, lr, sched, cbs=(rates := Rates()), **kw) is learn
    return rates.used

def pytorchs(make, n, lr=.1, every=1):
    "Rates of `n` steps, of which the scheduler is told after each `every`-th"
    opt, used = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr, momentum=.9), []
    sched = make(opt)
    for i in range(n):
        used.append(sched.get_last_lr()[0])
        opt.step()
        if (i+1) % every == 0 and i+1 < n: sched.step()
    return used

schedulers = torch.optim.lr_scheduler
@pytest.mark.parametrize('n_epoch, sched, make, every', [
    (5, ExpDecay(.9), lambda opt: schedulers.ExponentialLR(opt, .9), 3),
    (7, ExpDecay(.5), lambda opt: schedulers.ExponentialLR(opt, .5), 3),
    (7, Steps((3,5), 7), lambda opt: schedulers.MultiStepLR(opt, [3,5], .1), 3),
    (7, Steps((3,5,6), 7, .5), lambda opt: schedulers.MultiStepLR(opt, [3,5,6], .5), 3),
    # twice as long, steps twice as late
    (15, Steps((3,5,6), 7.5), lambda opt: schedulers.MultiStepLR(opt, [6,10,12], .1), 3),
    (4, Triangle(.5), lambda opt: schedulers.CyclicLR(opt, 0., .1, 6, 6, cycle_momentum=False), 1),
    (5, Triangle(.2), lambda opt: schedulers.CyclicLR(opt, 0., .1, 3, 12, cycle_momentum=False), 1),
    # PyTorch ends its warm-up one step early and counts to the last step, which is one past ours
    (10, OneCycle(.3, 25., 2.5e5),
     lambda opt: schedulers.OneCycleLR(opt, .1, 31, pct_start=(.3*30+1)/31, cycle_momentum=False, div_factor=25,
                                       final_div_factor=1e4), 1),
    (6, OneCycle(.5, 10., 100.),
     lambda opt: schedulers.OneCycleLR(opt, .1, 19, pct_start=(.5*18+1)/19, cycle_momentum=False, div_factor=10,
                                       final_div_factor=10), 1)],
    ids=lambda v: 'oracle' if isinstance(v, type(lambda: 0)) else str(v))
def test_schedule_against_pytorch(n_epoch, sched, make, every, make_learner):
    assert np.ravel(rates_of(make_learner, n_epoch, .1, sched)) == pytest.approx(
        pytorchs(make, 3*n_epoch, every=every), rel=1e-6,
        abs=1e-8) # fastai's cosines are in float32

def test_warmup_cosine_against_pytorch(make_learner):
    up = pytorchs(lambda opt: schedulers.LinearLR(opt, 1e-9, 1., 6), 6)
    down = pytorchs(lambda opt: schedulers.CosineAnnealingLR(opt, 24), 24)
    assert np.ravel(rates_of(make_learner, 10, .1, WarmupCosine(.2))) == pytest.approx(up + down, rel=1e-6, abs=1e-9)

@pytest.mark.parametrize('n_epoch, at', [(300, (215,260,285)), (60, (43,52,57)), (30, (22,26,29)), (20, (15,18,19)),
                                         (10, (8,9,10)), (7, (6,7,7)), (1, (1,1,1))])
def test_steps_of_another_length(n_epoch, at):
    "The same parts of the training; an epoch whose first batch comes before the step begins at the old rate"
    sched, eager = Steps((215,260,285), 300), lambda e: sum(e >= a for a in at)
    assert ([round(math.log10(1/sched(e/n_epoch, n_epoch))) for e in range(n_epoch)]
            == [eager(e) for e in range(n_epoch)])

@pytest.mark.parametrize('sched', [ExpDecay(.5), OneCycle(), Steps((1,2), 3), WarmupCosine(.3), Triangle(.5)], ids=str)
def test_groups_start_epoch_and_momentum(sched, make_learner):
    "One factor for all parameter groups, a resumed fit goes on where it was, and momentum is left alone"
    whole = np.array(rates_of(make_learner, 3, slice(1e-3, 1e-2), sched,
                              lambda m: [list(m[0].parameters()), list(m[1:].parameters())]))
    assert (whole[:,0] == pytest.approx(whole[:,1]/10)
            and whole[:,1] == pytest.approx(np.ravel(rates_of(make_learner, 3, 1e-2, sched))))
    top = make_learner(opt_func=sgd, splitter=lambda m: [list(m[0].parameters()), list(m[1:].parameters())])
    top.fit_sched(1, slice(1e-2), lambda pct, n: 1., cbs=(rates := Rates()))
    assert rates.used == [pytest.approx([1e-3, 1e-2])]*3 # as in fastai: all groups but the last learn at a tenth
    learn = make_learner(opt_func=sgd)
    learn.fit_sched(3, .1, sched, start_epoch=1, cbs=(later := Rates()))
    assert np.ravel(later.used) == pytest.approx(whole[3:,1]*10) and {h['mom'] for h in learn.opt.hypers} == {.9}
    learn.fit_sched(3, .2, sched, reset_opt=True, wd=.01, cbs=(again := Rates()))
    assert np.ravel(again.used) == pytest.approx(whole[:,1]*20) and {h['wd'] for h in learn.opt.hypers} == {.01}

@pytest.mark.parametrize('name', [k for k in every if every[k].schedule])
def test_recipe_fits_by_its_schedule(name, make_dls, tiny_net):
    recipe = every[name].replace(attack=None if name == 'kind st' else FGSM(.01))
    dls = make_dls(n=64)
    learn = quiet(recipe.learner(dls, tiny_net(), teacher=teacher_of(recipe, tiny_net), cbs=(rates := Rates())))
    assert recipe.fit(learn, 2, .3) is learn
    want = [.3*recipe.schedule(i/4, 2) for i in range(4)]
    assert [pytest.approx([w]*len(r)) for w,r in zip(want, rates.used)] == rates.used
    recipe.fit(learn, 2)
    assert [r[0] for r in rates.used] == pytest.approx([w/.3*recipe.lr_for(dls) for w in want])

def test_epochs_are_the_recipes_and_none_is_none(make_dls, tiny_net):
    recipe = paper_teacher.replace(epochs=2, attack=FGSM(.01))
    learn = quiet(recipe.learner(make_dls(), tiny_net()))
    recipe.fit(learn)
    assert len(learn.recorder.values) == 2
    before = copy.deepcopy(learn.model.state_dict())
    recipe.fit(learn, 0) # as `learn.fit(0)`: nothing, not the recipe's number
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())


# --- recipes as objects ---

def test_but_and_at_eps():
    r = rslad_official.replace(epochs=20, bs=64)
    assert ((r.epochs, r.bs, r.lr, r.method, r.settings) == (20, 64, .1, 'rslad', dict(alpha=1., lam=5/6))
            and rslad_official.epochs == 300)
    with pytest.raises(TypeError, match="a recipe has no `epoch`: did you mean 'epochs'"):
        rslad_official.replace(epoch=20)
    with pytest.raises(TypeError, match="a recipe has no `x`: choose from .*epochs"):
        rslad_official.replace(bs=2, x=20)
    with pytest.raises(TypeError, match=r'`settings=recipe.settings \| dict\(alpha=0.5\)`'):
        rslad_official.replace(alpha=.5)
    with pytest.raises(Exception, match='assign'): rslad_official.epochs = 20
    for name,factor in (('rslad_official', 2), ('trades_official', 16/255/.031)):
        old, new = all_recipes[name].attack, all_recipes[name].at_eps(16/255).attack
        assert type(new) is type(old) and new.eps == 16/255 and new.step_size == pytest.approx(old.step_size*factor)
        assert new.settings == old.settings | dict(eps=16/255, step_size=new.step_size) and old.eps < 8.1/255
    fast = fast_at.at_eps(16/255).attack
    assert type(fast) is FFGSM and fast.settings == dict(eps=16/255, step_size=pytest.approx(20/255))
    assert kind_recipes['st'].at_eps(.1) is kind_recipes['st']
    assert type(paper_teacher.replace(attack=FGSM()).at_eps(.1).attack) is FGSM
    assert paper_teacher.at_eps(0.).attack.step_size == 0

@each
def test_repr_is_readable_and_complete(name):
    "All that is not the default, one line each; read back, it is the same recipe"
    recipe, names = every[name], dict(
        Recipe=Recipe, PGD=PGD, FFGSM=FFGSM, ExpDecay=ExpDecay, OneCycle=OneCycle, Steps=Steps,
        WarmupCosine=WarmupCosine, Triangle=Triangle, cifar_resnet18=cifar_resnet18)
    text = repr(recipe)
    assert ' object at ' not in text and 'functools' not in text and 'lambda' not in text
    lines = text.splitlines()
    assert (lines[0] == 'Recipe(' and lines[-1] == ')'
            and all(l.startswith('    ') and l.endswith(',') for l in lines[1:-1]))
    again = eval(text, names | dict(wide_resnet=lambda *args, **kw: partial(wide_resnet, *args, **kw), ReLU=nn.ReLU))
    for k in numbers[name]:
        if k != 'attack': assert getattr(again, k) == getattr(recipe, k), k
    assert repr(again) == text and ('note=' in text) == bool(recipe.note)

@pytest.mark.parametrize('bad', ['kd', 'AT', '', None])
def test_unknown_method(bad, make_dls, tiny_net):
    "Not a wish for a teacher, which would not help"
    for teacher in (None, tiny_net(seed=7)):
        with pytest.raises(ValueError, match='unknown `method`.*st.*trades.*rslad'):
            paper_teacher.replace(method=bad).learner(make_dls(), tiny_net(), teacher=teacher)

def test_training_on_attacks_needs_one(make_dls, tiny_net):
    "An attack that was taken out does not come back as the default one"
    for recipe in (paper_teacher, trades_official, paper_student):
        with pytest.raises(ValueError, match='`attack`'):
            recipe.replace(attack=None).learner(make_dls(), tiny_net(), teacher=teacher_of(recipe, tiny_net))
    for recipe in (paper_teacher.replace(method='st'), paper_student.replace(method='ckd', settings={})):
        with pytest.raises(ValueError, match='`attack`.*takes none'):
            recipe.learner(make_dls(), tiny_net(), teacher=teacher_of(recipe, tiny_net))
        run(recipe.replace(attack=None), make_dls(n=32), tiny_net(), teacher_of(recipe, tiny_net))

def dls_state(dls):
    return ([(type(dl), dl.bs, dl.shuffle, dl.drop_last, [(type(f), f.order) for f in dl.after_batch.fs],
              id(dl.dataset), id(dl)) for dl in dls.loaders], dls.train.rng.getstate())

@pytest.mark.parametrize('break_it', [
    lambda r, dls, net: r['paper_student'].learner(dls, net),
    lambda r, dls, net: r['fast_at'].learner(dls, net, teacher=net),
    lambda r, dls, net: r['fast_at'].learner(dls, net, synthetic='no.npz'),
    lambda r, dls, net: r['rebuffi_at_plus'].learner(dls, net, synthetic='no.npz'),
    lambda r, dls, net: r['paper_student'].replace(settings=dict(alpha=2.)).learner(dls, net, teacher=net),
    lambda r, dls, net: r['wang_trades'].replace(settings=dict(beta=-1.)).learner(dls, net),
    lambda r, dls, net: r['rebuffi_at_plus'].replace(ema=1.).learner(dls, net),
    lambda r, dls, net: r['paper_student'].learner(dls, net, teacher=net[:5]), # 128 classes
    lambda r, dls, net: r['fast_at'].replace(method='kd').learner(dls, net),
    lambda r, dls, net: r['fast_at'].replace(attack=None).learner(dls, net),
    lambda r, dls, net: r['rebuffi_at_plus'].replace(synthetic=1.).learner(
        dls, net, synthetic=(np.zeros((4,8,8), np.uint8), np.zeros(4, int)))])
def test_raises_and_leaves_all_as_it_was(break_it, make_dls, tiny_net, snapshot):
    dls, net = make_dls(stats=([.3], [.25])), tiny_net()
    dls.train.one_batch()
    before, weights, rng = dls_state(dls), snapshot.take(net), torch.get_rng_state()
    with pytest.raises((ValueError, FileNotFoundError)): break_it(all_recipes, dls, net)
    assert (dls_state(dls) == before and snapshot.same(weights, snapshot.take(net))
            and torch.equal(rng, torch.get_rng_state()))

def test_an_architecture_in_place_of_a_network(make_dls, tiny_net):
    "Ours is made for the classes and channels of the data; of another the way out is told, and nothing has changed"
    import torchvision
    from rkd_fastai.models import wide_resnet
    dls = make_dls(n_classes=4)
    for arch in (partial(cifar_resnet18, width=1/16), partial(wide_resnet, 10, 1)):
        net = paper_teacher.learner(dls, arch).model
        assert isinstance(net, nn.Module) and net(torch.rand(2, 1, 8, 8)).shape == (2, 4)
    rng = torch.get_rng_state()
    for arch,says in ((torchvision.models.resnet18, '`net` must be .*got resnet18, which makes one: '
                                                    'call it for 4 classes, or remove `net`'),
                      (nn.Linear, 'got Linear, which'), ('resnet18', "got 'resnet18': build .*timm.create_model")):
        with pytest.raises(TypeError, match=says): paper_teacher.learner(dls, arch)
    assert torch.equal(rng, torch.get_rng_state())

@pytest.mark.parametrize('says, make', [
    ("`teacher` is missing.*'akd'", lambda dls, net: paper_student.learner(dls, net)),
    ("`teacher` is missing.*'rslad'", lambda dls, net: rslad_official.learner(dls, net)),
    ("remove `teacher`.*'at' takes no teacher.*'paper_student', 'rslad_official', 'ard_official'",
     lambda dls, net: fast_at.learner(dls, net, teacher=net)),
    ("no synthetic images", lambda dls, net: paper_teacher.learner(dls, net, synthetic='1m.npz')),
    ("no file of synthetic images", lambda dls, net: wang_trades.learner(dls, net, synthetic='1m.npz')),
    ("knows 10 classes, but `dls` have 4", lambda dls, net: ard_official.learner(dls, net, teacher=net))])
def test_errors(says, make, make_dls, tiny_net):
    with pytest.raises((ValueError, OSError), match=says):
        make(make_dls(n_classes=4) if 'classes' in says else make_dls(), tiny_net())

@each
def test_every_recipe_trains_on_normalised_images(name, make_dls, tiny_net, snapshot):
    """Three channels behind Normalize: the loaders it is given stay as they are, and so do users' callbacks and
    arguments"""
    class Mine(Callback): pass
    recipe, dls = every[name], make_dls(n=64, n_valid=16, channels=3, stats=([.4]*3, [.3]*3))
    before, mine = dls_state(dls), Mine()
    learn = quiet(recipe.learner(dls, tiny_net(n_in=3),
                                 teacher=tiny_net(n_in=3, seed=7) if recipe.needs_teacher else None,
                                 cbs=mine, metrics=accuracy, wd_bn_bias=True))
    assert learn.mine is mine and learn.metrics[0].name == 'accuracy' and learn.wd_bn_bias
    tfms = [type(f) for f in learn.dls.train.after_batch.fs]
    assert dls_state(dls)[0] == before[0] and tfms.count(Cutout) == bool(recipe.cutout)
    assert tfms.count(Normalize) == 1 and tfms[-1] is Normalize
    recipe.replace(epochs=1).fit(learn)
    assert math.isfinite(learn.recorder.values[-1][0]) and all(p.isfinite().all() for p in learn.model.parameters())
    assert (dls_state(dls)[0] == before[0] and isinstance(learn.dls.valid.after_batch.fs[-1], Normalize)
            and Cutout not in [type(f) for f in learn.dls.valid.after_batch.fs])

@pytest.mark.parametrize('stats', [None, ([.3], [.25])], ids=['pixels', 'normalised'])
def test_cutout_is_sized_to_the_images_and_last(stats, make_dls, tiny_net):
    "18 of 32 pixels are 4 of 8; black in pixel space; and the square is whole, as no crop or flip comes after it"
    white = (np.full((64,8,8), 255, np.uint8), np.arange(64) % 10)
    dls = arrays_dls(white, white, bs=64, batch_tfms=PadCropFlip(0 if stats else 2))
    if stats: dls.add_tfms([Normalize.from_stats(*stats, cuda=False)], 'after_batch')
    learn = rebuffi_at_plus.learner(dls, tiny_net())
    tfms = list(learn.dls.train.after_batch.fs)
    assert [type(f) for f in tfms[:3]] == [PadCropFlip, Cutout, IntToFloatTensor] and tfms[1].side == 4
    if not stats: return
    x = plain(learn.dls.train.one_batch()[0])*stats[1][0] + stats[0][0]
    black = (x.abs() < 1e-5).flatten(1).sum(1)
    # a quarter of it, at a corner
    assert black.max() == 16 and ((x.abs() < 1e-5) | ((x-1).abs() < 1e-5)).all() and black.min() >= 4
    assert (plain(learn.dls.valid.one_batch()[0])*stats[1][0] + stats[0][0] - 1).abs().max() < 1e-5

def test_cutmix_in_place_of_cutout(make_dls, tiny_net):
    learn = quiet(rebuffi_at_plus.replace(cutout=0, cutmix=True).learner(make_dls(), tiny_net()))
    assert isinstance(learn.cut_mix, CutMix) and Cutout not in [type(f) for f in learn.dls.train.after_batch.fs]
    rebuffi_at_plus.fit(learn, 1)
    assert math.isfinite(learn.recorder.values[-1][0])

@pytest.mark.parametrize('resident', [False, True])
def test_synthetic_images_fill_their_part(resident, make_dls, tiny_net, tmp_path):
    "70 % of 20 are 14, told by their colour; an epoch is as long as before"
    npz = tmp_path/'syn.npz'
    np.savez(npz, image=np.full((30,8,8), 255, np.uint8), label=np.arange(30) % 10)
    dls = make_dls(n=60, bs=20, device_resident=resident)
    learn = wang_at_plus.learner(dls, tiny_net(), synthetic=npz)
    assert [int((x.flatten(1).min(1).values == 1).sum()) for x,_ in learn.dls.train] == [14]*3
    assert [int((x.flatten(1).min(1).values == 1).sum()) for x,_ in dls.train] == [0]*3
    quiet(learn)
    wang_at_plus.fit(learn, 1)
    half = paper_teacher.replace(synthetic=.5).learner(dls, tiny_net(), synthetic=npz)
    assert [int((x.flatten(1).min(1).values == 1).sum()) for x,_ in half.dls.train] == [10]*3

def test_loss_function_and_network(make_dls, tiny_net):
    "The recipe's own where none is given, and a given one is used as it is"
    dls = make_dls(channels=3)
    learn = paper_teacher.replace(arch=lambda n_out, n_in: tiny_net(n_in, n_out)).learner(dls)
    assert learn.model[0].in_channels == 3 and learn.model[-1].out_features == 10
    one = wang_at_plus.learner(dls, tiny_net(n_in=3), loss_func=CrossEntropyLossFlat())
    assert (type(one.loss_func) is CrossEntropyLossFlat
            and wang_trades.learner(dls, tiny_net(n_in=3)).loss_func.eps == .1)
    assert type(paper_teacher.learner(dls, tiny_net(n_in=3)).loss_func) is CrossEntropyLossFlat

def test_network_without_batchnorm(make_dls, tiny_net):
    learn = quiet(rebuffi_at_plus.learner(make_dls(), tiny_net(bn=False)))
    rebuffi_at_plus.fit(learn, 1)
    assert [len(g['params']) for g in learn.opt.opt.param_groups] == [4, 0]

@pytest.mark.parametrize('name', ['paper_teacher', 'rebuffi_at_plus', 'wang_trades', 'rslad_official'])
def test_export_and_load(name, make_dls, tiny_net, tmp_path):
    "The exported Learner predicts as this one, and holds no teacher"
    recipe, kw = all_recipes[name], {}
    if recipe.synthetic: kw = dict(synthetic=(np.zeros((30,8,8), np.uint8), np.arange(30) % 10))
    learn = quiet(recipe.learner(make_dls(), tiny_net(), teacher=teacher_of(recipe, tiny_net), path=tmp_path, **kw))
    recipe.fit(learn, 1)
    learn.export('out.pkl')
    with pytest.warns(UserWarning, match='pickle'): again = load_learner(tmp_path/'out.pkl')
    item = learn.dls.valid_ds[0][0]
    assert torch.equal(learn.predict(item)[2], again.predict(item)[2])
    assert b'Teacher' not in (tmp_path/'out.pkl').read_bytes()
