"""Every loss against its equation in the paper: written out naively in float64, by hand, by its gradient and at its
limits."""
from math import log

import pytest, torch

from rkd_fastai.losses import *

# --- the equations, term by term and in float64; KL(f_S, target) is the paper's notation for KL(target ‖ f_S) ---

def softmax(z): return z.exp() / z.exp().sum(1, keepdim=True)
def ce(p, y): return -(y * p.log()).sum(1)
def kl(p, q): return torch.where(q > 0, q * (q.clamp_min(1e-300).log() - p.log()), 0).sum(1)

def eq1(s, t, y, lam=.9, T=1.): return (1-lam)*ce(softmax(s), y) + lam*T**2*kl(softmax(s/T), t)
def eq25(s, s_adv, t, y, alpha=1., lam=5/6, T=1.):
    return (1-lam)*ce(softmax(s), y) + lam*T**2*kl(softmax(s_adv/T), alpha*t + (1-alpha)*y)
def eq36(s, s_adv, t, y, alpha=1., lam=5/6, T=1.):
    mixed = alpha*t + (1-alpha)*y
    return T**2*((1-lam)*kl(softmax(s/T), mixed) + lam*kl(softmax(s_adv/T), mixed))
def eq47(s_adv, t_adv, y, alpha=1., T=1.): return T**2*ce(softmax(s_adv/T), alpha*t_adv + (1-alpha)*y)
def adaad(s, s_adv, t, t_adv, y, alpha=1., lam=1.):
    return lam*kl(softmax(s_adv), alpha*t_adv + (1-alpha)*y) + (1-lam)*kl(softmax(s), alpha*t + (1-alpha)*y)
def iad(s, s_adv, t, t_adv, y, alpha=1., lam=1., beta=.1):
    w = (y*t_adv).sum(1)**beta
    distilled = w*kl(softmax(s_adv), alpha*t + (1-alpha)*y) + (1-w)*kl(softmax(s_adv), softmax(s))
    return (1-lam)*ce(softmax(s), y) + lam*distilled
def saad(s, s_adv, t, t_adv, y, alpha=1., beta=0., gamma=1., scale=5., igdm=0.):
    H = -(t_adv*t_adv.log()).sum(1) if gamma == 1 else (t_adv**gamma).sum(1).log()/(1 - gamma)
    w = scale*(H - H.min())
    adv,clean = kl(softmax(s_adv), alpha*t_adv + (1-alpha)*y), kl(softmax(s), alpha*t + (1-alpha)*y)
    return w*(adv + igdm) + beta*(1 - w/w.max())*clean
def trades(s, s_adv, y, beta=6.): return ce(softmax(s), y) + beta*kl(softmax(s_adv), softmax(s))

bs,c = 16,7
def double(*size, seed):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
s,s_adv = 3*double(bs, c, seed=1), 3*double(bs, c, seed=2)
t,t_adv = softmax(2*double(bs, c, seed=3)), softmax(2*double(bs, c, seed=5))
four = (s, s_adv, t, t_adv)
hard = torch.arange(bs) % c
soft = softmax(double(bs, c, seed=4))

cases = { # our loss, the equation, its tensors before `targ`, settings to try
    'ckd':    (ckd_loss, eq1, (s, t), [{}, dict(lam=.3), dict(T=4.), dict(lam=0.), dict(lam=1., T=.5)]),
    'ard':    (ard_loss, eq25, (s, s_adv, t), [{}, dict(alpha=.8), dict(alpha=.3, lam=.5, T=4.), dict(alpha=0.),
                                               dict(lam=0.), dict(lam=1., T=.5)]),
    'rslad':  (rslad_loss, eq36, (s, s_adv, t), [{}, dict(alpha=.8), dict(alpha=.3, lam=.5, T=4.), dict(alpha=0.),
                                                 dict(lam=0.), dict(lam=1., T=.5)]),
    'akd':    (akd_loss, eq47, (s_adv, t), [{}, dict(alpha=.8), dict(alpha=.3, T=4.), dict(alpha=0.), dict(T=.5)]),
    'adaad':  (adaad_loss, adaad, four, [{}, dict(alpha=.8, lam=.3), dict(alpha=0.), dict(lam=0.)]),
    'mtard':  (mtard_loss, lambda *a, lam=.5, **kw: adaad(*a, lam=lam, **kw), four, [{}, dict(alpha=.8, lam=.3)]),
    'iad':    (iad_loss, iad, four, [{}, dict(alpha=.8, lam=.3), dict(alpha=0., beta=0.), dict(lam=0.), dict(beta=2.)]),
    'saad':   (saad_loss, saad, four, [{}, dict(alpha=.8, beta=.7), dict(alpha=0., gamma=2., scale=1.),
                                       dict(gamma=3.)]),
    'trades': (trades_loss, trades, (s, s_adv), [{}, dict(beta=0.), dict(beta=1.5)])}
every = pytest.mark.parametrize('name,kw', [(k, kw) for k,(*_,kws) in cases.items() for kw in kws],
                                ids=[f'{k}-{kw}' for k,(*_,kws) in cases.items() for kw in kws])
each = pytest.mark.parametrize('name', cases)
distilled = pytest.mark.parametrize('name', [k for k in cases if k != 'trades'])
with_temperature = pytest.mark.parametrize('name', ['ckd', 'ard', 'rslad', 'akd'])
targs = pytest.mark.parametrize('targ', [hard, soft], ids=['hard', 'soft'])
def as_labels(targ): return targ if targ.is_floating_point() else torch.eye(c, dtype=torch.float64)[targ]
def n_logits(name): return 1 if name in ('ckd', 'akd') else 2   # how many of its tensors are student logits

@every
@targs
def test_equals_the_equation(name, kw, targ):
    loss, eq, tensors, _ = cases[name]
    want = eq(*tensors, as_labels(targ), **kw)
    got = loss(*(o.float() for o in tensors), targ if targ is hard else targ.float(), reduction='none', **kw)
    assert got.shape == (bs,)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    mean = loss(*(o.float() for o in tensors), targ if targ is hard else targ.float(), **kw)
    assert mean.ndim == 0
    torch.testing.assert_close(mean.double(), want.mean(), rtol=1e-6, atol=1e-6)

@every
@targs
def test_gradient_of_the_student_logits(name, kw, targ):
    loss, eq, tensors, _ = cases[name]
    n = n_logits(name)
    def grads(f, dtype, labels):
        ts = [o.to(dtype).requires_grad_(i < n) for i,o in enumerate(o.clone() for o in tensors)]
        out = f(*ts, labels, **kw)
        return torch.autograd.grad(out if out.ndim == 0 else out.mean(), ts[:n], allow_unused=True,
                                   materialize_grads=True)
    for got, want in zip(grads(loss, torch.float32, targ if targ is hard else targ.float()),
                         grads(eq, torch.float64, as_labels(targ))):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)

@each
def test_sum_is_the_sum_of_the_batch(name):
    loss, _, tensors, _ = cases[name]
    torch.testing.assert_close(loss(*tensors, hard, reduction='sum'), loss(*tensors, hard, reduction='none').sum())


# --- numbers worked by hand: logits log 1 and log 3 are probabilities 1/4 and 3/4 ---

quarter, half = torch.tensor([[0., log(3)]]), torch.zeros(1, 2)
teacher, first = torch.tensor([[.5, .5]]), torch.tensor([0])

def check(got, want): assert got.item() == pytest.approx(want, abs=1e-6)

def test_soft_targets_by_hand():
    torch.testing.assert_close(soft_targets(teacher, first, .8), torch.tensor([[.6, .4]]))
    torch.testing.assert_close(soft_targets(teacher, torch.tensor([[.25, .75]]), .4), torch.tensor([[.35, .65]]))
    torch.testing.assert_close(soft_targets(teacher, first, 1.), teacher)
    torch.testing.assert_close(soft_targets(teacher, first, 0.), torch.tensor([[1., 0.]]))

def test_ensemble_averages_probabilities_by_hand():
    a, b = torch.tensor([[1., 0.]]), torch.tensor([[.2, .8]])
    torch.testing.assert_close(ensemble_probs([a, b]), torch.tensor([[.6, .4]]))
    torch.testing.assert_close(ensemble_probs([a, b], [.25, .75]), torch.tensor([[.4, .6]]))
    torch.testing.assert_close(ensemble_probs([a]), a)

def test_ckd_by_hand():
    # CE = log 4; KL(½,½ ‖ ¼,¾) = ½ log 2 + ½ log ⅔ = ½ log 4/3
    check(ckd_loss(quarter, teacher, first, lam=.9), .1*log(4) + .9*.5*log(4/3))

def test_ard_by_hand():
    # student ¼,¾ on x and ½,½ on x′; target .8·(½,½) + .2·(1,0) = .6,.4
    check(ard_loss(quarter, half, teacher, first, alpha=.8, lam=.5), .5*log(4) + .5*(.6*log(1.2) + .4*log(.8)))
    check(ard_loss(quarter, half, teacher, first, lam=.5), .5*log(4))

def test_rslad_by_hand():
    check(rslad_loss(quarter, half, teacher, first, alpha=.8, lam=.75),
          .25*(.6*log(.6/.25) + .4*log(.4/.75)) + .75*(.6*log(1.2) + .4*log(.8)))

def test_akd_by_hand():
    # at T=½ the logits double: probabilities 1/10 and 9/10
    check(akd_loss(quarter, teacher, first), .5*log(4) + .5*log(4/3))
    check(akd_loss(quarter, teacher, first, alpha=.8), .6*log(4) + .4*log(4/3))
    check(akd_loss(quarter, teacher, first, alpha=0.), log(4))
    check(akd_loss(quarter, teacher, first, alpha=.8, T=.5), .25*(.6*log(10) + .4*log(10/9)))

def test_trades_by_hand():
    # KL(f(x) ‖ f(x′)) = ¼ log ½ + ¾ log 3/2
    check(trades_loss(quarter, half, first, beta=6.), log(4) + 6*(.25*log(.5) + .75*log(1.5)))


# --- limits, precision, extremes ---

def test_alpha_0_and_1():
    y = torch.eye(c)[hard]
    args = s.float(), s_adv.float()
    torch.testing.assert_close(
        akd_loss(args[1], t, hard, alpha=0.), torch.nn.functional.cross_entropy(args[1], hard), rtol=0, atol=0)
    torch.testing.assert_close(rslad_loss(*args, t, hard, alpha=0.), rslad_loss(*args, y, hard, alpha=1.))
    torch.testing.assert_close(ard_loss(*args, t, hard, alpha=0.), ard_loss(*args, y, hard, alpha=1.))
    for loss, a in [(akd_loss, args[1:]), (rslad_loss, args)]: # at α=1 they have no use for the labels
        torch.testing.assert_close(loss(*a, t, hard), loss(*a, t, hard.flip(0)), rtol=0, atol=0)

def test_rslad_is_least_where_student_equals_target():
    best = rslad_loss(t.log(), t.log(), t, hard)
    assert best.abs() < 1e-6 < rslad_loss(s, t.log(), t, hard)

@each
@targs
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_computes_in_float32(name, targ, dtype):
    loss, _, tensors, _ = cases[name]
    low = [o.to(dtype) for o in tensors]
    y = targ if targ is hard else targ.to(dtype)
    got = loss(*low, y)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, loss(*(o.float() for o in low), y if y is hard else y.float()), rtol=0, atol=0)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_targets_are_float32(dtype):
    for got in (soft_targets(t.to(dtype), hard, .5), soft_targets(t.to(dtype), soft.to(dtype), .5),
                ensemble_probs([t.to(dtype)]*2)):
        assert got.dtype == torch.float32

@each
@targs
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_finite_at_extreme_logits(name, targ, dtype):
    loss, _, tensors, kws = cases[name]
    extreme = (1e4*torch.tensor([1., -1.]).repeat(bs, c)[:,:c]).to(dtype) # every class at one end or the other
    # a teacher that is certain, so that 0·log 0 occurs
    zeros = torch.eye(c)[hard.flip(0)]
    for kw in kws:
        n = n_logits(name)
        ts = [(extreme*(1-2*i)).requires_grad_() for i in range(n)] + [zeros]*(len(tensors) - n)
        out = loss(*ts, targ if targ is hard else targ.float(), **kw)
        out.backward()
        assert out.isfinite() and all(o.grad.isfinite().all() for o in ts if o.requires_grad), kw

@each
def test_classes_at_int32_and_uint8(name):
    loss, _, tensors, _ = cases[name]
    for dtype in (torch.int32, torch.uint8):
        torch.testing.assert_close(loss(*tensors, hard.to(dtype)), loss(*tensors, hard))


# --- what bad input gets ---

@pytest.mark.parametrize('bad', [-.1, 1.1, float('nan')])
def test_weights_outside_0_1(bad):
    with pytest.raises(ValueError, match='alpha'): soft_targets(t, hard, bad)
    with pytest.raises(ValueError, match='alpha'): akd_loss(s, t, hard, alpha=bad)
    for loss,ts in ((rslad_loss, four[:3]), (ard_loss, four[:3]), (adaad_loss, four), (mtard_loss, four),
                    (iad_loss, four)):
        with pytest.raises(ValueError, match='alpha'): loss(*ts, hard, alpha=bad)
        with pytest.raises(ValueError, match='lam'): loss(*ts, hard, lam=bad)
    with pytest.raises(ValueError, match='alpha'): saad_loss(*four, hard, alpha=bad)
    with pytest.raises(ValueError, match='lam'): ckd_loss(s, t, hard, lam=bad)

@with_temperature
@pytest.mark.parametrize('bad', [0., -1., float('nan'), float('inf')])
def test_T_not_positive(name, bad):
    loss, _, tensors, _ = cases[name]
    with pytest.raises(ValueError, match='`T`'): loss(*tensors, hard, T=bad)

@pytest.mark.parametrize('bad', [-1., float('nan'), float('inf')])
def test_numbers_that_must_be_positive(bad):
    with pytest.raises(ValueError, match='beta'): trades_loss(s, s_adv, hard, beta=bad)
    with pytest.raises(ValueError, match='beta'): iad_loss(*four, hard, beta=bad)
    for name in ('beta','gamma','scale'):
        with pytest.raises(ValueError, match=name): saad_loss(*four, hard, **{name: bad})

@each
def test_targ_that_does_not_fit(name):
    loss, _, tensors, _ = cases[name]
    for bad in (hard + c, hard - 1, soft[:,:-1], hard[:,None]):
        with pytest.raises(ValueError, match='targ'):
            loss(*tensors, bad, alpha=.5) if name not in ('ckd', 'trades') else loss(*tensors, bad)

@distilled
def test_teacher_of_other_classes(name):
    loss, _, tensors, _ = cases[name]
    with pytest.raises(ValueError, match='t_probs'): loss(*tensors[:-1], softmax(s[:,:-1]), hard)

@each
def test_targ_of_another_batch_size(name):
    loss, _, tensors, _ = cases[name]
    for bad in (hard[:1], soft[:1], hard[:-1]): # one label must not be broadcast over the batch
        with pytest.raises((ValueError, RuntimeError)): loss(*tensors, bad)

@each
def test_unknown_reduction(name):
    loss, _, tensors, _ = cases[name]
    with pytest.raises(ValueError, match='reduction'): loss(*tensors, hard, reduction='median')

@pytest.mark.parametrize('betas', [[.5], [.2, .2], [1.5, -.5], [.5, float('nan')], [.5, .3, .2]])
def test_betas_that_are_no_weights(betas):
    with pytest.raises(ValueError, match='betas'): ensemble_probs([t, t], betas)

def test_ensemble_of_nothing_or_of_other_shapes():
    with pytest.raises(ValueError, match='probs'): ensemble_probs([])
    with pytest.raises(ValueError, match='probs'): ensemble_probs([t, t[:,:-1]])

@each
def test_a_class_that_is_ruled_out(name):
    "A logit of -∞ where the target is 0: the loss and the gradients of the other classes, not NaN"
    loss, _, tensors, _ = cases[name]
    n, cut = n_logits(name), [o.clone() for o in tensors]
    for i,o in enumerate(cut): o[:,-1] = -torch.inf if i < n or name == 'trades' else 0.
    for o in cut[n:]: o /= o.sum(1, keepdim=True)
    without = [o[:,:-1].clone() for o in cut]
    def grads(ts):
        ts = [o.float().requires_grad_(i < n) for i,o in enumerate(ts)]
        out = loss(*ts, hard % (c-1))
        return out, torch.autograd.grad(out, ts[:n], allow_unused=True, materialize_grads=True)
    (got,g), (want,w) = grads(cut), grads(without)
    torch.testing.assert_close(got, want)
    for a,b in zip(g, w): torch.testing.assert_close(a[:,:-1], b); assert (a[:,-1] == 0).all()

def test_trades_names_its_logits():
    with pytest.raises(ValueError, match='`s_logits`.*`s_logits_adv`') as e: trades_loss(s, s_adv[:,:-1], hard)
    assert 'teacher' not in str(e.value)

def test_labels_of_another_batch():
    with pytest.raises(ValueError, match='`targ` has 1 label for 4 rows'):
        soft_targets(torch.rand(4, 3).softmax(1), torch.tensor([1]), .5)

def test_igdm_is_its_definition():
    "The differences of logits as probabilities, in float64, with the gradients of the student's logits"
    s_minus,t_plus,t_minus = (2*double(bs, c, seed=i) for i in (6, 7, 8))
    def naive(a, b): return kl(softmax(a - b), softmax(t_plus - t_minus))
    ours,exact = ([o.to(dtype).requires_grad_() for o in (s, s_minus)] for dtype in (torch.float32, torch.float64))
    got,want = igdm_loss(*ours, t_plus.float(), t_minus.float(), reduction='none'), naive(*exact)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    for a,b in zip(torch.autograd.grad(got.sum(), ours), torch.autograd.grad(want.sum(), exact)):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    assert igdm_loss(s, s_minus, s, s_minus).abs() < 1e-6

def test_igdm_inside_saad():
    each = igdm_loss(s_adv, s, t_adv.log(), t.log(), reduction='none')
    torch.testing.assert_close(saad_loss(*four, hard, igdm=each, reduction='none').double(),
                               saad(*four, as_labels(hard), igdm=each.double()), rtol=1e-5, atol=1e-6)

def test_saad_of_a_teacher_that_is_equally_sure_of_all_images():
    "Every weight is 0 then, and the clean term has its full weight"
    got = saad_loss(s, s_adv, t, t_adv[:1].expand(bs, c), hard, beta=1.)
    torch.testing.assert_close(got.double(), kl(softmax(s), t).mean(), rtol=1e-6, atol=1e-6)
