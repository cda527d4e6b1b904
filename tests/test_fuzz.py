"""Losses and attacks on whatever hypothesis thinks of: what they promise holds, to 1e-5 of the same computation in
float64, or a `ValueError` names the argument."""
import copy

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from rkd_fastai.attacks.pgd import FFGSM, FGSM, PGD
from rkd_fastai.attacks.autoattack import AutoAttack
from rkd_fastai.losses import *
from rkd_fastai.teachers import Teacher

# the same examples in every run, on every machine
fuzz = lambda n: settings(max_examples=n, derandomize=True, deadline=None, database=None,
                          suppress_health_check=list(HealthCheck))
double, nan, inf = torch.double, float('nan'), float('inf')
floats = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
seeds = st.integers(0, 2**31 - 1)
fractions = st.one_of(st.sampled_from([0., 1.]), st.floats(0, 1))
Ts = st.one_of(st.just(1.), st.floats(.05, 20))

# --- tensors ---

def rand(seed, *shape): return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=double)
def randn(seed, *shape): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=double)

def laid_out(t, how):
    "`t` with the same values and shape, otherwise in memory"
    if how == 'strided': return torch.stack([t, torch.full_like(t, nan)], -1)[...,0]
    if how == 'transposed': return t.transpose(0, -1).contiguous().transpose(0, -1)
    if how == 'channels_last' and t.ndim == 4: return t.contiguous(memory_format=torch.channels_last)
    if how == 'offset': return torch.cat([torch.full_like(t[:1], nan) if len(t) else t, t])[min(len(t), 1):]
    return t
layouts = st.sampled_from(['contiguous','strided','transposed','channels_last','offset'])

@st.composite
def logits_of(draw, bs, c):
    "Logits as networks return them: ordinary, extreme up to ±1e4, or nearly equal"
    z = randn(draw(seeds), bs, c)*draw(st.sampled_from([0., 1e-3, 1., 10., 3e3]))
    if draw(st.booleans()): z = z + draw(st.sampled_from([-1e3, 1e3]))
    if draw(st.booleans()): z = torch.where(rand(draw(seeds), bs, c) < .3, torch.tensor(1e4, dtype=double)*z.sign(), z)
    return laid_out(z.clamp(-1e4, 1e4).to(draw(floats)), draw(layouts))

@st.composite
def probs_of(draw, bs, c):
    "Probabilities of a teacher, of which many underflow or one is all"
    z = randn(draw(seeds), bs, c)*draw(st.sampled_from([0., 1., 10., 1e3]))
    return laid_out(z.softmax(1).to(draw(floats)), draw(layouts))

@st.composite
def labels_of(draw, bs, c):
    hard = torch.randint(c, (bs,), generator=torch.Generator().manual_seed(draw(seeds)))
    kinds = [torch.int64, torch.int32] + [torch.uint8]*(c <= 256)
    return draw(st.one_of(st.sampled_from(kinds).map(hard.to), probs_of(bs, c)))

batch_sizes = st.one_of(st.integers(1, 5), st.sampled_from([0, 1, 33]))
# a single class is refused, see `test_labels_that_are_none`
class_counts = st.one_of(st.integers(2, 12), st.sampled_from([2, 3, 100, 1000]))

# --- the losses in float64, from what float32 holds of their arguments ---

def to_double(t): return t.detach().float().to(double)
def logp(z, T=1.):
    z = z/T
    z = z - z.amax(1, keepdim=True)
    return z - z.exp().sum(1, keepdim=True).log()
def dist(y, c): return to_double(y) if y.is_floating_point() else torch.eye(c, dtype=double)[y.long()]
def ce(z, target, T=1.): return -(target*logp(z, T)).sum(1)
def kl(z, target, T=1.): return torch.where(target > 0, target*(target.clamp_min(1e-320).log() - logp(z, T)), 0.).sum(1)
def mix(t, y, alpha): return alpha*t + (1-alpha)*y

def ckd(s, t, y, lam, T): return (1-lam)*ce(s, y) + lam*T*T*kl(s, t, T)
def ard(s, s_adv, t, y, alpha, lam, T): return (1-lam)*ce(s, y) + lam*T*T*kl(s_adv, mix(t, y, alpha), T)
def rslad(s, s_adv, t, y, alpha, lam, T):
    return T*T*((1-lam)*kl(s, mix(t, y, alpha), T) + lam*kl(s_adv, mix(t, y, alpha), T))
def akd(s_adv, t, y, alpha, T): return T*T*ce(s_adv, mix(t, y, alpha), T)
def trades(s, s_adv, y, beta): return ce(s, y) + beta*(logp(s).exp()*(logp(s) - logp(s_adv))).sum(1)

losses = dict(ckd=(ckd_loss, ckd, 1, True, ('lam','T')), ard=(ard_loss, ard, 2, True, ('alpha','lam','T')),
              rslad=(rslad_loss, rslad, 2, True, ('alpha','lam','T')),
              akd=(akd_loss, akd, 1, True, ('alpha','T')), trades=(trades_loss, trades, 2, False, ('beta',)))
values = dict(lam=fractions, alpha=fractions, T=Ts, beta=st.floats(0, 10))

@st.composite
def loss_calls(draw, name):
    "(loss, reference, student logits, teacher's probabilities or none, labels, settings)"
    loss, ref, n, teacher, names = losses[name]
    bs, c = draw(batch_sizes), draw(class_counts)
    return (loss, ref, [draw(logits_of(bs, c)) for _ in range(n)], [draw(probs_of(bs, c))]*teacher,
            draw(labels_of(bs, c)), {k: draw(values[k]) for k in names})

def tolerance(zs, kw):
    "float32 has 24 bits, and the terms whose differences the loss is made of grow with the logits"
    T, most = kw.get('T', 1.), max([z.abs().max().item() for z in zs if z.numel()], default=0.)
    return 1e-5*max(T*T, 1, kw.get('beta', 1.))*max(1., most/T/30)

each_loss = pytest.mark.parametrize('name', losses)

@each_loss
@fuzz(200)
@given(st.data())
def test_loss_is_the_float64_one(name, data):
    loss, ref, zs, ts, y, kw = data.draw(loss_calls(name))
    want = ref(*map(to_double, zs), *map(to_double, ts), dist(y, zs[0].shape[1]), **kw)
    got = loss(*zs, *ts, y, **kw, reduction='none')
    assert got.dtype == torch.float32 and got.shape == want.shape and got.isfinite().all()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=tolerance(zs, kw))
    torch.testing.assert_close(loss(*zs, *ts, y, **kw, reduction='sum').double(), want.sum(),
                               rtol=1e-5, atol=tolerance(zs, kw)*max(len(y), 1))
    if len(y):
        torch.testing.assert_close(loss(*zs, *ts, y, **kw).double(), want.mean(), rtol=1e-5, atol=tolerance(zs, kw))
    else:
        with pytest.raises(ValueError, match='no images'): loss(*zs, *ts, y, **kw)

@each_loss
@fuzz(120)
@given(st.data())
def test_gradient_is_finite_and_the_float64_one(name, data):
    "Also where probabilities underflow"
    loss, ref, zs, ts, y, kw = data.draw(loss_calls(name))
    ours, theirs = [z.detach().float().requires_grad_() for z in zs], [to_double(z).requires_grad_() for z in zs]
    grad = lambda f, z, *args: torch.autograd.grad(f(*z, *args).sum(), z, materialize_grads=True, allow_unused=True)
    for got, want in zip(grad(lambda *a: loss(*a, y, **kw, reduction='none'), ours, *ts),
                         grad(lambda *a: ref(*a, dist(y, zs[0].shape[1]), **kw), theirs, *map(to_double, ts))):
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=3*tolerance(zs, kw))
    low = [z.detach().clone().requires_grad_() for z in zs] # in the logits' own dtype it need not be so near
    assert all(g.isfinite().all() and g.dtype == z.dtype for g,z in zip(
        grad(lambda *a: loss(*a, y, **kw, reduction='none'), low, *ts), low))

@each_loss
@fuzz(100)
@given(st.data())
def test_images_do_not_feel_each_other(name, data):
    """The losses of a permuted batch are the permuted losses; an image with a logit of NaN or ∞ has no loss, and its
    neighbours have theirs"""
    loss, _, zs, ts, y, kw = data.draw(loss_calls(name))
    assume(len(y))
    each = loss(*zs, *ts, y, **kw, reduction='none')
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(data.draw(seeds)))
    torch.testing.assert_close(loss(*(t[order] for t in (*zs, *ts)), y[order], **kw, reduction='none'), each[order],
                               rtol=1e-6, atol=tolerance(zs, kw)/10)
    i, j, at = (data.draw(st.integers(0, n-1)) for n in (len(y), zs[0].shape[1], len(zs)))
    bad = [z.clone() for z in zs]
    bad[at][i,j] = data.draw(st.sampled_from([nan, inf])) # -inf is a class that is ruled out
    got = loss(*bad, *ts, y, **kw, reduction='none')
    others = torch.arange(len(y)) != i
    assert not got[i].isfinite()
    torch.testing.assert_close(got[others], each[others], rtol=1e-6, atol=tolerance(zs, kw)/10)

@pytest.mark.parametrize('name', ['ard','rslad','akd'])
@fuzz(80)
@given(st.data())
def test_alpha_0_and_1(name, data):
    "At α=0 the teacher is not in the loss, at α=1 the labels are not: to the bit"
    loss, _, zs, ts, y, kw = data.draw(loss_calls(name))
    bs, c = zs[0].shape
    ts, others = [ts[0].contiguous()], dict(t=data.draw(probs_of(bs, c)).contiguous(),
                                            # the layout decides on the order of sums
                                            y=data.draw(labels_of(bs, c)).contiguous())
    y = y.contiguous()
    same = lambda alpha, a, b: torch.equal(*(
        loss(*zs, t, y, **kw | dict(alpha=alpha), reduction='none') for t,y in (a, b)))
    assert same(0., (ts[0], y), (others['t'], y))
    if name != 'ard': assert same(1., (ts[0], y), (ts[0], others['y']))
    else:
        assert torch.equal(*(loss(*zs, ts[0], y, **kw | dict(alpha=1., lam=1.), reduction='none')
                             for y in (y, others['y'])))

@fuzz(150)
@given(st.data(), batch_sizes, class_counts, fractions)
def test_soft_targets_are_probabilities(data, bs, c, alpha):
    t, y = data.draw(probs_of(bs, c)), data.draw(labels_of(bs, c))
    got = soft_targets(t, y, alpha)
    assert got.dtype == torch.float32 and (got >= 0).all()
    torch.testing.assert_close(got.double(), mix(to_double(t), dist(y, c), alpha), rtol=1e-6, atol=1e-7)

@fuzz(150)
@given(st.data(), batch_sizes, class_counts, st.integers(1, 4))
def test_ensembles(data, bs, c, n):
    ps, w = [data.draw(probs_of(bs, c)) for _ in range(n)], rand(data.draw(seeds), n) + .01
    betas = data.draw(st.sampled_from([None, (w/w.sum()).tolist()]))
    got = ensemble_probs(ps, betas)
    assert got.dtype == torch.float32
    want = sum(b*to_double(p) for b,p in zip(betas or [1/n]*n, ps))
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)

def broken(draw, args, kw, c):
    "The arguments with one thing wrong, and what the error has to name"
    args, kw, bs = dict(args), dict(kw), len(args['targ'])
    y = args['targ']
    wrongs = dict(short_targ=('targ', dict(targ=torch.cat([y, y[:1]]) if bs else torch.zeros(1, dtype=torch.long))),
                  tall_targ=('targ', dict(targ=torch.zeros(bs, 1, 1, dtype=torch.long))),
                  other_soft=('targ', dict(targ=torch.zeros(bs, c+1))), flat_soft=('targ', dict(targ=torch.zeros(bs))))
    if bs:
        wrongs |= dict(too_high=('targ', dict(targ=torch.full((bs,), c))),
                       below=('targ', dict(targ=torch.full((bs,), -1))))
    for k in [k for k in args if k != 'targ']:
        wrongs[k] = (k if k != 's_logits' else r's_logits|t_probs|targ',
                     {k: torch.zeros(bs, c+1, 1) if k.startswith('s_') else torch.zeros(bs, c+1)})
    wrong = draw(st.sampled_from(sorted([*wrongs, *kw, 'reduction'])))
    if wrong in wrongs: return args | wrongs[wrong][1], kw, wrongs[wrong][0]
    bad = dict(lam=[-.1, 1.1, nan, inf], alpha=[-.1, 1.1, nan, -inf], T=[0., -1., nan, inf], beta=[-1., nan, inf],
               reduction=['max', None])[wrong]
    return args, kw | {wrong: draw(st.sampled_from(bad))}, wrong

@each_loss
@fuzz(150)
@given(st.data())
def test_what_a_loss_cannot_take_is_named(name, data):
    loss, _, zs, ts, y, kw = data.draw(loss_calls(name))
    args = (dict(zip(['s_logits_adv'] if name == 'akd' else ['s_logits','s_logits_adv'], zs))
            | ({} if not ts else {'t_probs_adv' if name == 'akd' else 't_probs': ts[0]}) | dict(targ=y))
    args, kw, named = broken(data.draw, args, kw, zs[0].shape[1])
    with pytest.raises(ValueError, match=f"`({named.removesuffix('_adv') if 't_probs' in named else named})`"):
        loss(**args, **kw)

# --- attacks ---

def steps_of(step_size, eps): return None if step_size is None else step_size*eps

@st.composite
def attacks(draw):
    eps = draw(st.sampled_from([0., 1/255, 8/255, .3, 1.]))
    kind = draw(st.sampled_from(['pgd','pgd','pgd','fgsm','ffgsm']))
    if kind == 'fgsm': return FGSM(eps)
    step = draw(st.sampled_from([None, 0., .25, 1., 2.5]))
    if kind == 'ffgsm': return FFGSM(eps, steps_of(step, eps))
    start = draw(st.sampled_from([True, False, .5, 1e-3]))
    return PGD(eps, draw(st.integers(0, 3)), steps_of(step, eps), draw(st.sampled_from(['Linf','L2'])), start,
               draw(st.integers(1, 2)) if start else 1, draw(st.sampled_from(['ce','kl','cw'])))

class Net(nn.Module):
    """A small network whose logits are `scale` times those of others; of the images whose first pixel is odd they
    are `bad`"""
    def __init__(self, c, n_out, seed, scale, bn, bad=None):
        super().__init__()
        self.norm, self.lin = nn.BatchNorm2d(c) if bn else nn.Identity(), nn.Linear(c*16, n_out)
        self.scale, self.bad = scale, bad
        for i,p in enumerate(self.parameters()): p.data = randn(seed+i, *p.shape).float()*.3 + (p.ndim == 1)
        self.lin.bias.requires_grad_(False)
    def forward(self, x):
        z = self.lin(torch.tanh(F.adaptive_avg_pool2d(self.norm(x), 4)).flatten(1))*self.scale
        return z if self.bad is None else z*torch.where(x[:,0,0,0] > .5, self.bad, 1.)[:,None].to(z)

@st.composite
def images(draw):
    bs, c, (h, w) = (draw(st.one_of(st.integers(1, 4), st.sampled_from([0, 1]))), draw(st.integers(1, 4)),
                     draw(st.sampled_from([(1,1), (4,4), (8,8), (3,9)])))
    x = rand(draw(seeds), bs, c, h, w)
    kind = draw(st.sampled_from(['uniform','black and white','one','zero','tiny']))
    x = (dict(uniform=x, one=torch.ones_like(x), zero=torch.zeros_like(x), tiny=x*1e-4)[kind]
         if kind != 'black and white' else x.round())
    return laid_out(x.to(draw(floats)), draw(layouts))

@st.composite
def attack_calls(draw, bad=st.none()):
    "(attack, network, images, labels)"
    x, n_out = draw(images()), draw(st.one_of(st.integers(2, 10), st.sampled_from([2, 1000])))
    net = Net(x.shape[1], n_out, draw(st.integers(0, 9)), draw(st.sampled_from([0., 1., 1., 1e4])),
              draw(st.booleans()), draw(bad)).to(x.dtype)
    attack = draw(attacks())
    y = draw(labels_of(len(x), n_out))
    if getattr(attack, 'objective', 'ce') == 'kl' and not y.is_floating_point(): y = F.one_hot(y.long(), n_out).float()
    return attack, net.train(draw(st.booleans())), x, y

def state(net):
    return [copy.deepcopy(net.state_dict()), [m.training for m in net.modules()],
            [p.requires_grad for p in net.parameters()], [p.grad for p in net.parameters()]]
def same_state(a, b): return all(torch.equal(v, b[0][k]) for k,v in a[0].items()) and a[1:] == b[1:]

def promised(attack, net, x, y):
    "x′, after all that an attack promises has been looked at"
    was, before, given = state(net), x.clone(), y.clone()
    x_adv = attack(net, x, y)
    assert same_state(state(net), was) and torch.equal(x, before) and torch.equal(y, given)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad and x_adv.grad_fn is None
    assert x_adv.isfinite().all() and (x_adv >= 0).all() and (x_adv <= 1).all()
    d = (x_adv.double() - x.double()).flatten(1)
    assert (d.abs().amax(1) if attack.norm == 'Linf' else d.norm(dim=1)).le(attack.eps + 1e-6).all() if len(x) else True
    return x_adv

@fuzz(620)
@given(attack_calls())
def test_attack_keeps_its_promises(call): promised(*call)

@fuzz(300)
@given(attack_calls(st.sampled_from([nan, inf, -inf, 1e38])))
def test_attack_on_logits_that_are_not_finite(call):
    "An image that has no gradient stays in its ball"
    promised(*call)

@fuzz(16)
@given(attack_calls(st.sampled_from([None, None, nan, 1e38])), st.sampled_from(['square','apgd-ce']), st.booleans(),
       st.sampled_from([0., 1/255, .3]))
def test_autoattack_keeps_them_too(call, version, fast, eps):
    _, net, x, y = call
    assume(net.lin.out_features > 1 and not y.is_floating_point())
    promised(AutoAttack(eps, version=version, queries=10, fast=fast), net.eval(), x, y)

def naive(attack, net, x, y):
    "PGD from `x`, written out: every image by itself, in the dtype of `x`"
    out = []
    for a, b in zip(x.split(1), y.split(1)):
        a_adv = a.clone()
        for _ in range(attack.steps):
            a_adv = a_adv.detach().requires_grad_()
            z = net(a_adv)
            target = dist(b, z.shape[1])
            if attack.objective == 'cw':
                right = target.argmax(1).item()
                loss = (max([z[0,j] for j in range(z.shape[1]) if j != right], key=lambda v: v.item()) - z[0,right]
                        if z.shape[1] > 1 else z.sum()*0)
            else: loss = -(target*logp(z)).sum() # the entropy of the target, which KL adds, has no gradient
            g, = torch.autograd.grad(loss, a_adv)
            if attack.norm == 'Linf':
                a_adv = a_adv.detach() + attack.step_size*g.sign()
                a_adv = torch.max(torch.min(a_adv, a + attack.eps), a - attack.eps).clamp(0, 1)
            else:
                d = a_adv.detach() + attack.step_size*g/max(g.norm().item(), 1e-12) - a
                a_adv = (a + d*min(1., attack.eps/max(d.norm().item(), 1e-12))).clamp(0, 1)
        out.append(a_adv.detach())
    return torch.cat(out)

@fuzz(250)
@given(st.data())
def test_attack_is_the_naive_one(data):
    "In float64, where no sign is in doubt; image by image, hence whatever the batch and its order"
    n_out, eps = data.draw(st.integers(2, 12)), data.draw(st.sampled_from([1/255, .1, .5]))
    x = laid_out(rand(data.draw(seeds), data.draw(st.integers(1, 4)), 2, 4, 4), data.draw(layouts))
    net = Net(2, n_out, data.draw(st.integers(0, 9)), data.draw(st.sampled_from([.3, 1., 3.])),
              data.draw(st.booleans())).double().eval()
    attack = PGD(eps, data.draw(st.integers(1, 4)), data.draw(st.sampled_from([None, .7*eps, 2*eps])),
                 data.draw(st.sampled_from(['Linf','L2'])), False,
                 objective=data.draw(st.sampled_from(['ce','kl','cw'])))
    y = data.draw(labels_of(len(x), n_out))
    if y.is_floating_point(): y = y.double() + .01; y = y/y.sum(1, keepdim=True) # of one dtype, and no class of none
    elif attack.objective == 'kl': y = F.one_hot(y.long(), n_out).double()
    got = promised(attack, net, x, y)
    torch.testing.assert_close(got, naive(attack, net, x, y), rtol=0, atol=1e-5)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(data.draw(seeds)))
    torch.testing.assert_close(attack(net, x[order], y[order]), got[order], rtol=0, atol=1e-5)

@fuzz(150)
@given(st.data())
def test_images_that_are_none_are_refused(data):
    "And nothing is touched"
    attack, net, x, y = data.draw(attack_calls())
    assume(x.numel())
    bad = x.clone()
    bad[-1,-1,-1,-1] = data.draw(st.sampled_from([nan, inf, -inf, -.1, 1.1, 255.]))
    kind = data.draw(st.sampled_from(['value','dtype','ndim','labels']))
    x, y = dict(value=(bad, y), dtype=((x*255).to(torch.uint8), y), ndim=(x[0], y), labels=(x, y[:0]))[kind]
    was = state(net)
    with pytest.raises((ValueError, TypeError), match='`targ`' if kind == 'labels' else '`x`'): attack(net, x, y)
    assert same_state(state(net), was)

@fuzz(150)
@given(st.data(), batch_sizes, class_counts, Ts, floats)
def test_teachers_in_any_precision(data, bs, c, T, dtype):
    "Probabilities of the logits that the network gives, in float32"
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, c)).to(dtype)
    net[1].weight.data *= data.draw(st.sampled_from([1., 1e3]))
    x = laid_out(rand(data.draw(seeds), bs, 1, 4, 4).to(dtype), data.draw(layouts))
    got = Teacher(net).probs(x, T)
    assert got.dtype == torch.float32 and got.shape == (bs, c)
    with torch.no_grad(): want = logp(net(x).to(double), T).exp() if bs else torch.zeros(0, c, dtype=double)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
