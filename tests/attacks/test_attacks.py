"The attacks against their published implementations, and what they promise about images and model."
import copy, logging

import pytest, torch, torch.nn as nn, torch.nn.functional as F

from rkd_fastai.attacks.pgd import *
from rkd_fastai.attacks.autoattack import *
from rkd_fastai.evaluation.robustness import robust_accuracy

eps = .1 # of the digits: about what the trained networks are sensitive to
every_attack = pytest.mark.parametrize('attack', [
    PGD(), PGD(eps, restarts=2), PGD(eps, random_start=False), PGD(eps, objective='kl'), PGD(.5, norm='L2'),
    PGD(.5, norm='L2', random_start=False), PGD(.5, norm='L2', restarts=2), FGSM(), FFGSM()], ids=repr)

def correct(model, x, y):
    with torch.no_grad(): return model(x).argmax(1) == y
def accuracy(model, x, y): return correct(model, x, y).float().mean().item()
def distance(a, b, norm): return (a.double()-b.double()).flatten(1).norm(dim=1, p=float('inf') if norm == 'Linf' else 2)
def norm_of(attack): return getattr(attack, 'norm', 'Linf')


# --- against the published implementations ---

def torchattacks_pgd(model, norm, e, steps, step_size, random_start):
    import torchattacks
    if norm == 'Linf': return torchattacks.PGD(model, eps=e, alpha=step_size, steps=steps, random_start=random_start)
    return torchattacks.PGDL2(model, eps=e, alpha=step_size, steps=steps, random_start=random_start)

def foolbox_pgd(model, norm, e, steps, step_size, random_start):
    import foolbox
    cls = foolbox.attacks.LinfPGD if norm == 'Linf' else foolbox.attacks.L2PGD
    attack = cls(abs_stepsize=step_size, steps=steps, random_start=random_start)
    fmodel = foolbox.PyTorchModel(model, bounds=(0, 1), device='cpu')
    return lambda x,y: attack(fmodel, x, y, epsilons=e)[1]

@pytest.mark.few(4)
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('theirs', [torchattacks_pgd, foolbox_pgd])
@pytest.mark.parametrize('random_start', [True, False])
@pytest.mark.parametrize('net,norm,e', [('plain_net', 'Linf', .1), ('plain_net', 'L2', .5), ('robust_net', 'Linf', .1),
                                        ('robust_net', 'L2', .5)])
def test_pgd_is_as_strong_as_theirs(net, norm, e, random_start, theirs, test_images, request):
    model, (x, y) = request.getfixturevalue(net), test_images
    kw = dict(steps=20, step_size=e/4, random_start=random_start)
    starts = 6 if random_start else 1 # single random starts differ by half a point
    ours = sum(accuracy(model, PGD(e, norm=norm, **kw)(model, x, y), y) for _ in range(starts))/starts
    attack = theirs(model, norm, e, **kw)
    want = sum(accuracy(model, attack(x, y).detach(), y) for _ in range(starts))/starts
    assert .02 < want < accuracy(model, x, y) - .1, 'the oracle says nothing here: choose another eps'
    assert ours <= want + .005

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('net', ['plain_net', 'robust_net'])
def test_fgsm_is_torchattacks_fgsm(net, test_images, request):
    import torchattacks
    model, (x, y) = request.getfixturevalue(net), test_images
    torch.testing.assert_close(FGSM(eps)(model, x, y), torchattacks.FGSM(model, eps=eps)(x, y), rtol=0, atol=1e-7)

@pytest.mark.filterwarnings('ignore')
def test_pgd_without_random_start_is_torchattacks_pgd(robust_net, test_images):
    import torchattacks
    x, y = test_images
    ours = PGD(eps, steps=5, step_size=.03, random_start=False)(robust_net, x, y)
    theirs = torchattacks.PGD(robust_net, eps=eps, alpha=.03, steps=5, random_start=False)(x, y)
    # the sign of a gradient next to 0 may depend on the order of a sum: all but a few pixels agree
    assert ((ours-theirs).abs() < 1e-6).float().mean() > .999

def test_ffgsm_starts_in_the_ball_and_takes_one_step(robust_net, test_images):
    x, y = test_images
    torch.manual_seed(3); got = FFGSM(eps)(robust_net, x, y)
    torch.manual_seed(3); start = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1).requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(robust_net(start), y, reduction='sum'), start)
    want = torch.max(torch.min(start + 1.25*eps*g.sign(), x+eps), x-eps).clamp(0, 1)
    torch.testing.assert_close(got, want.detach(), rtol=0, atol=1e-6)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('norm,e', [('Linf', .15), pytest.param('L2', .5, marks=pytest.mark.slow)])
def test_autoattack_is_pyautoattack(norm, e, robust_net, test_images):
    from pyautoattack import AutoAttack as Published
    x, y = (o[:60] for o in test_images)
    x_adv = AutoAttack(e, norm=norm, seed=5, bs=24)(robust_net, x, y) # several batches
    logging.getLogger('auto-attack').setLevel(logging.ERROR)
    theirs, _ = Published(robust_net, norm=norm, eps=e, seed=5,
                          version='standard').run_standard_evaluation(x, y, batch_size=24)
    flags = correct(robust_net, x_adv, y)
    assert torch.equal(flags, correct(robust_net, theirs, y))
    torch.testing.assert_close(x_adv, theirs, rtol=0, atol=0)
    assert 0 < flags.sum() < 60
    assert distance(x_adv, x, norm).max() <= e + 1e-6 and 0 <= x_adv.min() and x_adv.max() <= 1
    # at least as strong as PGD, and its random numbers are its own
    assert flags.float().mean() <= robust_accuracy(robust_net, x, y, PGD(e, steps=20, norm=norm))

def test_autoattack_leaves_random_numbers_and_tracer_alone(robust_net, test_images):
    import sys
    x, y = (o[:4] for o in test_images)
    tracer = sys.gettrace()
    torch.manual_seed(1); want = torch.rand(3)
    torch.manual_seed(1); AutoAttack(eps, version='rand')(robust_net, x, y)
    assert torch.equal(torch.rand(3), want) and sys.gettrace() is tracer

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('n_out', [2, 3, 4])
def test_autoattack_on_few_classes(n_out, tiny_net):
    "Its targeted parts take 9 targets, which a network of few classes does not have"
    model, x = tiny_net(n_out=n_out).eval(), torch.rand(8, 1, 8, 8)
    y = model(x).argmax(1)
    x_adv = AutoAttack(.2)(model, x, y)
    assert distance(x_adv, x, 'Linf').max() <= .2 + 1e-6 and accuracy(model, x_adv, y) < 1

@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings('ignore')
def test_autoattack_in_other_dtypes(dtype, tiny_net):
    model, x = tiny_net().to(dtype).eval(), torch.rand(6, 1, 8, 8).to(dtype)
    y = model(x).argmax(1)
    x_adv = AutoAttack(version='rand')(model, x, y)
    assert x_adv.dtype == dtype and distance(x_adv, x, 'Linf').max() <= 8/255 + 1e-6
    assert 0 <= x_adv.min() and x_adv.max() <= 1


# --- what comes back ---

@every_attack
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_ball_range_dtype(attack, dtype, tiny_net):
    model, x = tiny_net().to(dtype), torch.rand(64, 1, 8, 8).to(dtype)
    x[:8], x[8:16] = 0, 1 # where the range cuts the ball
    y = torch.arange(64) % 10
    x_adv = attack(model, x, y)
    assert x_adv.dtype == dtype and x_adv.shape == x.shape
    assert not x_adv.requires_grad and x_adv.grad_fn is None and x_adv.data_ptr() != x.data_ptr()
    assert 0 <= x_adv.min() and x_adv.max() <= 1
    assert distance(x_adv, x, norm_of(attack)).max() <= attack.eps + 1e-6
    assert not torch.equal(x_adv, x)

@every_attack
def test_images_given_are_not_written_to(attack, tiny_net):
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    before = x.clone()
    attack(tiny_net(), x, y)
    assert torch.equal(x, before)

@every_attack
def test_raises_the_loss(attack, robust_net, test_images):
    x, y = test_images
    loss = lambda x: F.cross_entropy(robust_net(x), y).item()
    with torch.no_grad(): assert loss(attack(robust_net, x, y)) > loss(x) + .01

@pytest.mark.parametrize('norm,e', [('Linf', 0.), ('L2', 0.)])
def test_eps_0_is_the_image(norm, e, tiny_net):
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(PGD(e, norm=norm)(tiny_net(), x, torch.arange(4)), x, rtol=0, atol=0)

def test_steps_0_is_noise_in_the_ball():
    """With no steps the random start is left: uniform under Linf; of random length under L2, where a start uniform
    in the volume lies on the sphere"""
    x, y = torch.full((4000, 1, 8, 8), .5), torch.zeros(4000).long()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    d = (PGD(.1, steps=0)(model, x, y) - x).flatten()
    assert abs(d.std() - .2/12**.5) < .002 and d.abs().max() > .099
    r = distance(PGD(.1, steps=0, norm='L2')(model, x, y), x, 'L2')
    # from the sphere PGD is up to a point weaker than torchattacks' on the plain network at radius 0.7
    assert .3 < (r < .05).double().mean() < .7 and .09 < r.max() <= .1 + 1e-6

def test_large_images_under_l2(tiny_net):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 5))
    x = torch.rand(2, 3, 224, 224)
    for e in (.5, 3.): assert distance(PGD(e, norm='L2')(model, x, torch.arange(2)), x, 'L2').max() <= e + 1e-6

def test_restarts_only_help(robust_net, test_images):
    x, y = test_images
    once = accuracy(robust_net, PGD(eps, steps=3)(robust_net, x, y), y)
    assert accuracy(robust_net, PGD(eps, steps=3, restarts=5)(robust_net, x, y), y) <= once + .005

def test_soft_targ(robust_net, test_images):
    "One-hot labels are the classes; the KL objective climbs away from the soft labels themselves"
    x, y = (o[:64] for o in test_images)
    attack = PGD(eps, random_start=False)
    torch.testing.assert_close(attack(robust_net, x, F.one_hot(y, 10).float()), attack(robust_net, x, y),
                               rtol=0, atol=1e-6)
    soft = robust_net(x).softmax(1).detach()
    kl = lambda x: F.kl_div(robust_net(x).log_softmax(1), soft, reduction='batchmean').item()
    with torch.no_grad(): assert kl(PGD(eps, objective='kl')(robust_net, x, soft)) > kl(x) + .1

def test_attack_is_the_same_for_each_image_whatever_the_batch(robust_net, test_images):
    "The loss is summed, not averaged, and tiny gradients keep their sign: an image does not feel its neighbours"
    x, y = (o[:32] for o in test_images)
    for attack in (PGD(eps, random_start=False), PGD(.5, norm='L2', random_start=False)):
        one_by_one = torch.cat([attack(robust_net, a, b) for a,b in zip(x.split(1), y.split(1))])
        assert ((attack(robust_net, x, y) - one_by_one).abs() < 1e-4).float().mean() > .99

@every_attack
@pytest.mark.parametrize('n', [0, 1])
def test_batch_of_none_and_of_one(attack, n, tiny_net):
    x_adv = attack(tiny_net(), torch.rand(n, 1, 8, 8), torch.zeros(n).long())
    assert x_adv.shape == (n, 1, 8, 8)

@every_attack
@pytest.mark.parametrize('layout', ['strided', 'channels_last', 'expanded'])
def test_memory_layouts(attack, layout, tiny_net):
    model, y = tiny_net(n_in=3), torch.arange(8)
    x = dict(strided=torch.rand(8, 3, 16, 16)[:,:,::2,1::2],
             channels_last=torch.rand(8, 3, 8, 8).contiguous(memory_format=torch.channels_last),
             expanded=torch.rand(8, 1, 8, 8).expand(-1, 3, -1, -1))[layout]
    torch.manual_seed(0); got = attack(model, x, y)
    torch.manual_seed(0); want = attack(model, x.contiguous(), y)
    assert distance(got, x, norm_of(attack)).max() <= attack.eps + 1e-6 and got.shape == want.shape
    if not getattr(attack, 'random_start', True): torch.testing.assert_close(got, want, rtol=0, atol=1e-5)

def test_tensor_subclasses(tiny_net):
    "fastai's image and category tensors go in; what comes back is a tensor that takes part in anything"
    from fastai.vision.all import TensorCategory, TensorImage
    x_adv = PGD()(tiny_net(), TensorImage(torch.rand(4, 1, 8, 8)), TensorCategory(torch.arange(4)))
    assert x_adv.shape == (4, 1, 8, 8) and not x_adv.requires_grad


# --- what does not change ---

def mixed_model(tiny_net):
    "A network with mixed training flags, a frozen layer and gradients in the others"
    model = tiny_net(dropout=.5)
    model(torch.rand(4, 1, 8, 8)).sum().backward()
    # BatchNorm would learn from whatever passes
    model.train(); model[2].eval(); model[3].eval(); model[0].requires_grad_(False)
    return model

@every_attack
def test_nothing_of_the_model_changes(attack, tiny_net, snapshot):
    model = mixed_model(tiny_net)
    before = snapshot.take(model)
    attack(model, torch.rand(8, 1, 8, 8), torch.arange(8))
    assert snapshot.same(before, snapshot.take(model))

@pytest.mark.filterwarnings('ignore')
def test_nothing_of_the_model_changes_under_autoattack(tiny_net, snapshot):
    model = mixed_model(tiny_net)
    before = snapshot.take(model)
    AutoAttack(version='rand')(model, torch.rand(4, 1, 8, 8), torch.arange(4))
    assert snapshot.same(before, snapshot.take(model))

class Trips(nn.Module):
    "Raises from the `at`-th call on"
    def __init__(self, model, at, error): super().__init__(); self.model,self.left,self.error = model,at,error
    def forward(self, x):
        self.left -= 1
        if self.left <= 0: raise self.error('tripped')
        return self.model(x)

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('attack,at', [(PGD(), 1), (PGD(), 4), (PGD(restarts=2), 8), (FGSM(), 1), (AutoAttack(), 1),
                                       (AutoAttack(), 9)], ids=repr)
@pytest.mark.filterwarnings('ignore')
def test_nothing_of_the_model_changes_when_it_raises(attack, at, error, tiny_net, snapshot):
    import sys
    x, net = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), mixed_model(tiny_net)
    y = copy.deepcopy(net).eval()(x).argmax(1) # all stand, or AutoAttack would have little to do
    model = Trips(net, at, error)
    before, tracer = snapshot.take(model), sys.gettrace()
    random_state = torch.get_rng_state()
    with pytest.raises(error): attack(model, x, y)
    after = torch.get_rng_state()
    assert snapshot.same(before, snapshot.take(model)) and torch.is_grad_enabled() and sys.gettrace() is tracer
    if isinstance(attack, AutoAttack):
        assert torch.equal(after, random_state)

def test_attack_without_perturb(tiny_net):
    with pytest.raises(NotImplementedError, match='Attack does not define its attack: write .*`perturb'):
        Attack()(tiny_net(), torch.rand(2, 1, 8, 8), torch.arange(2))

def test_dropout_is_off_and_batchnorm_in_eval(tiny_net):
    "The model that the attack sees is in eval mode, whatever its flags"
    seen = []
    model = mixed_model(tiny_net)
    for m in model.modules(): m.register_forward_hook(lambda m,*_: seen.append(m.training))
    PGD()(model, torch.rand(4, 1, 8, 8), torch.arange(4))
    assert seen and not any(seen)

@every_attack
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_under_no_grad_and_inference_mode(attack, mode, tiny_net):
    model, y = tiny_net(), torch.arange(8)
    with mode():
        x = torch.rand(8, 1, 8, 8) # in inference mode, an inference tensor
        torch.manual_seed(1); got = attack(model, x, y)
        assert not torch.is_grad_enabled()
    torch.manual_seed(1); want = attack(model, x.clone(), y)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert not got.is_inference() # it can be trained on
    F.cross_entropy(model(got), y).backward()

@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_autoattack_under_no_grad_and_inference_mode(tiny_net):
    model, x = tiny_net().eval(), torch.rand(2, 1, 8, 8)
    y = model(x).argmax(1)
    want = AutoAttack(eps, version='rand')(model, x, y)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(): torch.testing.assert_close(AutoAttack(eps, version='rand')(model, x, y), want, rtol=0, atol=0)

@every_attack
def test_autocast_around_attack_and_training_step(attack, tiny_net):
    "Autocast caches its copies of the weights: copies made in the attack, without gradients, must not be trained on"
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    def grads(attacked):
        model = tiny_net(bn=False)
        with torch.autocast('cpu', torch.bfloat16):
            if attacked: attack(model, x, y)
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        return [p.grad for p in model.parameters()]
    for got,want in zip(grads(True), grads(False)):
        assert got is not None
        torch.testing.assert_close(got, want, rtol=0, atol=0)

def test_autocast_around_robust_accuracy_and_training_step(tiny_net):
    "The same where the forward passes are made under `no_grad`, as evaluation does"
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    model = tiny_net(bn=False)
    with torch.autocast('cpu', torch.bfloat16):
        robust_accuracy(model, x, y, PGD(steps=1))
        F.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())

def test_attack_between_two_steps_of_one_autocast(tiny_net):
    "The other way round: copies made by a training step, with gradients, are there when the attack begins"
    x, y, model = torch.rand(16, 1, 8, 8), torch.arange(16) % 10, tiny_net(bn=False)
    with torch.autocast('cpu', torch.bfloat16):
        first = F.cross_entropy(model(x), y)
        x_adv = PGD()(model, x, y)
        (first + F.cross_entropy(model(x_adv), y)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

def test_any_callable(tiny_net):
    model = tiny_net().eval()
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    attack = PGD(random_start=False)
    torch.testing.assert_close(attack(lambda x: model(x), x, y), attack(model, x, y))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# --- what bad input gets ---

@every_attack
@pytest.mark.parametrize('bad', [-.01, 1.01, 255., float('nan'), float('inf')])
def test_images_outside_0_1(attack, bad, tiny_net):
    x = torch.rand(4, 1, 8, 8); x[1,0,2,3] = bad
    with pytest.raises(ValueError, match=r'\[0, 1\]'): attack(tiny_net(), x, torch.arange(4))

def test_images_outside_0_1_under_autoattack(tiny_net):
    with pytest.raises(ValueError, match='span'): AutoAttack()(tiny_net(), torch.randn(4, 1, 8, 8), torch.arange(4))

def test_what_is_no_image_batch(tiny_net):
    y = torch.arange(4)
    with pytest.raises(TypeError, match='float'):
        PGD()(tiny_net(), torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8), y)
    with pytest.raises(ValueError, match='shape'): PGD()(tiny_net(), torch.rand(4, 8, 8), y)
    with pytest.raises(ValueError, match='targ'): PGD()(tiny_net(), torch.rand(4, 1, 8, 8), y[:3])
    for objective in ('ce','cw','kl'):
        with pytest.raises(ValueError, match='`targ` contains classes 1 to 12.*: give the network an output'):
            PGD(objective=objective)(tiny_net(), torch.rand(2, 1, 8, 8), torch.tensor([1,12]))

@pytest.mark.parametrize('cls', [PGD, FGSM, FFGSM, AutoAttack])
@pytest.mark.parametrize('bad', [-.1, 8., 1.01, float('nan'), float('inf')])
def test_eps_that_is_no_radius(cls, bad):
    with pytest.raises(ValueError, match='`eps`'): cls(bad)
    with pytest.raises(ValueError, match='`eps`'): cls(eps=bad)

@pytest.mark.parametrize('name,bad', [('step_size', .3), ('step_size', -.1), ('step_size', float('nan')),
                                      ('norm', 'L1'), ('norm', 'linf'), ('norm', 2),
                                      ('objective', 'dlr'), ('steps', -1), ('restarts', 0)])
def test_settings_that_make_no_sense(name, bad):
    with pytest.raises(ValueError, match=f'`{name}`'): PGD(.1, **{name: bad})

def test_step_size_of_2_5_eps_is_the_most():
    PGD(8/255, step_size=2.5*8/255); PGD(.1, step_size=.25)
    with pytest.raises(ValueError, match='step_size'): PGD(.1, step_size=.2501)
    with pytest.raises(ValueError, match='step_size'): FFGSM(.1, step_size=.3)

def test_eps_above_1_is_fine_under_l2(tiny_net):
    assert PGD(3., norm='L2').eps == 3 and AutoAttack(3., norm='L2').eps == 3

@pytest.mark.parametrize('name,bad', [('norm', 'L1'), ('version', 'custom'), ('bs', 0)])
def test_autoattack_settings_that_make_no_sense(name, bad):
    with pytest.raises(ValueError, match=f'`{name}`'): AutoAttack(**{name: bad})

def test_model_that_returns_no_logits(tiny_net):
    for model in (nn.Identity(), lambda x: (x.flatten(1), 0)):
        with pytest.raises(TypeError, match='logits'): PGD()(model, torch.rand(4, 1, 8, 8), torch.arange(4))


# --- settings ---

def test_settings_are_attributes_and_repr_makes_the_attack_again():
    for attack in (PGD(), PGD(.5, steps=3, step_size=.1, norm='L2', random_start=False, objective='kl'),
                   PGD(restarts=2), FGSM(4/255), FFGSM(), AutoAttack(), AutoAttack(.5, 'L2', 'rand', 3, 7)):
        again = eval(repr(attack))
        assert type(again) is type(attack)
        for k,v in attack.settings.items():
            assert getattr(again, k) == (pytest.approx(v) if isinstance(v, float) else v)

def test_default_settings():
    p = PGD()
    assert (p.eps, p.steps, p.norm, p.random_start, p.restarts, p.objective) == (8/255, 7, 'Linf', True, 1, 'ce')
    assert p.step_size == pytest.approx(2/255) and PGD(.4).step_size == pytest.approx(.1)
    assert FFGSM(.1).step_size == pytest.approx(.125) and FGSM().eps == FFGSM().eps == 8/255

# --- found by changing operators one at a time (tools/mutate.py) ---

@pytest.mark.parametrize('norm,e', [('Linf', .1), ('L2', 1.)])
def test_restarts_keep_the_worst(norm, e, robust_net, test_images):
    "The first attempt that changes the prediction, else the one with the highest loss"
    x, y = (o[:80] for o in test_images)
    torch.manual_seed(3); got = PGD(e, steps=2, norm=norm, restarts=3)(robust_net, x, y)
    torch.manual_seed(3); runs = [PGD(e, steps=2, norm=norm)(robust_net, x, y) for _ in range(3)]
    chosen = []
    with torch.no_grad():
        for i in range(len(x)):
            losses = [float('inf') if robust_net(r[i:i+1]).argmax() != y[i]
                      else F.cross_entropy(robust_net(r[i:i+1]), y[i:i+1]).item() for r in runs]
            chosen.append(losses.index(max(losses)))
            torch.testing.assert_close(got[i], runs[chosen[-1]][i], rtol=0, atol=1e-6)
    assert set(chosen) == {0, 1, 2}

def test_losses_that_are_climbed():
    "Against loops in float64"
    torch.manual_seed(0)
    logits, y = torch.randn(30, 7)*4, torch.randint(0, 7, (30,))
    soft = torch.rand(30, 7).softmax(1)
    rows = logits.double()
    margin = [max(v for c,v in enumerate(row.tolist()) if c != t) - row[t].item() for row,t in zip(rows, y.tolist())]
    torch.testing.assert_close(PGD(objective='cw').loss(logits, y), torch.tensor(margin))
    torch.testing.assert_close(PGD(objective='cw').loss(logits, F.one_hot(y, 7).float()), torch.tensor(margin))
    ce = lambda targ: torch.tensor([-(t*row.log_softmax(0)).sum().item() for row,t in zip(rows, targ.double())])
    torch.testing.assert_close(PGD().loss(logits, y), ce(F.one_hot(y, 7)))
    torch.testing.assert_close(PGD().loss(logits, soft), ce(soft))
    torch.testing.assert_close(PGD(objective='kl').loss(logits, soft),
                               ce(soft) + (soft.double()*soft.double().log()).sum(1).float())

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_rounding_leaves_what_needs_none(dtype):
    "Numbers of half precision are not moved; others go to a neighbour, never away from the image"
    from rkd_fastai.attacks.pgd import _settle
    x = torch.rand(500, generator=torch.Generator().manual_seed(0)).to(dtype)
    there = torch.rand(500, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(_settle(there.float(), x), there)
    between = there.float() + 1e-5
    got = _settle(between, x).float()
    assert ((got - x.float()).abs() <= (between - x.float()).abs()).all()

def test_start_of_a_given_width():
    "So many times N(0,1), clipped to the ball and the pixel range"
    x = torch.rand(4, 3, 8, 8)
    torch.manual_seed(5); got = PGD(.1, steps=0, random_start=.04)(lambda x: x.flatten(1), x, torch.arange(4))
    torch.manual_seed(5); torch.testing.assert_close(got, (x + (.04*torch.randn_like(x)).clamp(-.1, .1)).clamp(0, 1))

def test_a_restart_that_is_nan_does_not_end_the_others(monkeypatch):
    x, y, starts = torch.full((2, 1, 8, 8), .5), torch.tensor([0, 0]), iter([.51, .55, .53])
    def model(x):
        out = torch.stack([-x.mean((1,2,3)), x.mean((1,2,3)) - 2], 1)
        return torch.where((x.amax((1,2,3)) < .52)[:,None], torch.nan, out)
    monkeypatch.setattr(PGD, '_ascend', lambda self, model, x, targ: torch.full_like(x, next(starts)))
    assert (PGD(.1, restarts=3)(model, x, y) == .55).all()

def test_kl_where_a_class_is_ruled_out():
    "A logit of -∞ where the target is 0 leaves the loss of the other classes, not NaN"
    logits, soft = torch.randn(4, 3), torch.tensor([[.7, .3, 0.]]).expand(4, 3)
    want = PGD(objective='kl').loss(logits[:,:2], soft[:,:2])
    logits[:,2] = -torch.inf
    torch.testing.assert_close(PGD(objective='kl').loss(logits, soft), want)
