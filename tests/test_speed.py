"`folded`: the attack's fast path changes no result, on our networks and on foreign ones, and leaves nothing behind."
import copy, gc, pickle, weakref
from enum import Enum
from functools import partial
from types import SimpleNamespace

import numpy as np, pytest, timm, torch, torch.nn as nn, torch.nn.functional as F, torchvision
from fastai.vision.all import Adam, Callback, OptimWrapper
from torch.utils._python_dispatch import TorchDispatchMode

from rkd_fastai.attacks.pgd import FFGSM, FGSM, PGD, Attack
from rkd_fastai.attacks.autoattack import AutoAttack
from rkd_fastai.core import PixelModel, frozen
from rkd_fastai.evaluation.robustness import robust_flags
from rkd_fastai import speed as fast
from rkd_fastai.speed import _fast_layers, folded
from rkd_fastai.models import _EveryNth, cifar_resnet18, wide_resnet
from rkd_fastai.teachers import Teacher
from conftest import python

class NormInside(nn.Module):
    "As RobustBench's networks are: pixel space in, the normalisation a part of `forward`"
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer('mu', torch.tensor([.49,.48,.45]).view(1,3,1,1))
    def forward(self, x): return self.model((x - self.mu)/.25)

class Branches(nn.Module):
    "Control flow on values, which symbolic tracing cannot follow"
    def __init__(self): super().__init__(); self.net = cifar_resnet18(10, 1/8)
    def forward(self, x): return self.net(x) if x.sum() > 0 else -self.net(x)

class TwiceUsed(nn.Module):
    "One convolution before two BatchNorms, and one whose output is used beside its BatchNorm"
    def __init__(self):
        super().__init__()
        self.conv,self.bn1,self.bn2,self.conv2,self.bn3,self.head = (
            nn.Conv2d(3,16,3), nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.Conv2d(16,8,3), nn.BatchNorm2d(8),
            nn.Linear(8,10))
    def forward(self, x):
        h = F.relu(self.bn1(self.conv(x))) + F.relu(self.bn2(self.conv(x.flip(3)).flip(3)))
        z = self.conv2(h)
        return self.head(F.relu(self.bn3(z) + .1*z).mean((2,3)))

class Plain1d(nn.Module):
    "Linear before BatchNorm1d, without affine parameters, and a bias in the convolution"
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3,8,4,4), nn.BatchNorm2d(8, affine=False), nn.SiLU(), nn.Flatten(),
                                 nn.Linear(8*64,32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32,10))
    def forward(self, x): return self.net(x)

models = {
    'resnet18': (lambda: cifar_resnet18(10, 1/8), 20), 'wide_resnet': (lambda: wide_resnet(10, 1), 3),
    'normalisation in front': (lambda: PixelModel(cifar_resnet18(10, 1/8), [.5]*3, [.2]*3), 20),
    'normalisation inside': (lambda: NormInside(cifar_resnet18(10, 1/8)), 20), 'control flow': (Branches, 20),
    'used twice': (TwiceUsed, 0), 'linear': (Plain1d, 2),
    'torchvision cifar_resnet18': (lambda: torchvision.models.resnet18(num_classes=10), 20),
    'torchvision mobilenet': (lambda: torchvision.models.mobilenet_v3_small(num_classes=10), 34),
    'torchvision vit, no BatchNorm': (lambda: torchvision.models.VisionTransformer(
        32, 8, 2, 2, 32, 64, num_classes=10), 0),
    'timm cifar_resnet18': (lambda: timm.create_model('resnet18', num_classes=10), 20),
    'timm vgg with BatchNorm': (lambda: timm.create_model('vgg11_bn', num_classes=10), 8),
    'timm efficientnet': (lambda: timm.create_model('efficientnet_b0', num_classes=10), 0),
    'timm convnext': (lambda: timm.create_model('convnext_atto', num_classes=10), 0)}

def net_with_random_bn(make):
    "A network with BatchNorm statistics and affine parameters that are no longer the initial ones, in train mode"
    torch.manual_seed(0)
    model = make()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            nn.init.uniform_(m.weight, .5, 1.5)
            nn.init.normal_(m.bias, std=.2)
    with torch.no_grad():
        for _ in range(20): model(torch.rand(8, 3, 32, 32))
    return model

def logits_and_grad(model, x, y):
    x = x.clone().requires_grad_()
    logits = model(x)
    return logits.detach(), torch.autograd.grad(F.cross_entropy(logits, y, reduction='sum'), x)[0]

@pytest.mark.few(4)
@pytest.mark.parametrize('name', models)
def test_same_logits_and_gradient_signs(name):
    make, n_folded = models[name]
    model, x, y = net_with_random_bn(make).eval(), torch.rand(8, 3, 32, 32), torch.arange(8)
    with frozen(model):
        assert sum(s.bn is not None for s in _fast_layers(model, x)) == n_folded
        exact = [t.float() for t in logits_and_grad(copy.deepcopy(model).double(), x.double(), y)]
        plain = logits_and_grad(model, x, y)
        with folded(model, x): fast = logits_and_grad(model, x, y)
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-3, atol=1e-4)
    # as near the exact result as the plain model: the bar is 99.9 % of the signs, or what float32 itself reaches
    agree = lambda g: (g.sign() == exact[1].sign()).float().mean().item()
    assert ((fast[1].sign() == plain[1].sign()).float().mean() >= .999
            and agree(fast[1]) >= min(.999, agree(plain[1]) - 5e-4))

@pytest.mark.parametrize('attack', [PGD(.1), PGD(.7, norm='L2'), PGD(.1, restarts=2), PGD(.1, objective='kl'),
                                    FGSM(.1), FFGSM(.1)], ids=repr)
def test_attacks_are_as_strong(attack, robust_net, test_images):
    x, y = test_images
    flags = []
    for folds in (True, False):
        attack.folds = folds
        torch.manual_seed(0)
        targ = F.one_hot(y, 10).float() if attack.objective == 'kl' else y
        flags.append(robust_net(attack(robust_net, x, targ)).argmax(1) == y)
    del attack.folds
    assert (flags[0] != flags[1]).sum() <= 1 and flags[0].float().mean() < .95

def test_every_attack_gets_it_but_autoattack():
    "A new attack need not ask; AutoAttack's flags are to be the package's own"
    class Peek(Attack):
        def perturb(self, model, x, targ): self.bn = model.bn1.forward.__name__; return x
    model, x, y = net_with_random_bn(lambda: cifar_resnet18(10, 1/8)), torch.rand(4, 3, 32, 32), torch.arange(4)
    peek = Peek(); peek(model, x, y)
    assert peek.bn == '_same' and AutoAttack.folds is False
    peek.folds = False; peek(model, x, y)
    assert peek.bn == 'forward'

def test_nothing_is_left_behind(snapshot):
    model, x, y = net_with_random_bn(lambda: cifar_resnet18(10, 1/8)), torch.rand(4, 3, 32, 32), torch.arange(4)
    size, before = len(pickle.dumps(model)), snapshot.take(model)
    torch.manual_seed(0); after_rand = torch.rand(3)
    torch.manual_seed(0); PGD(random_start=False)(model, x, y)
    assert torch.equal(after_rand, torch.rand(3)), 'trying the fast layers drew random numbers'
    assert snapshot.same(before, snapshot.take(model)) and len(pickle.dumps(model)) == size
    assert not any({'forward'} & set(vars(m)) or m._forward_hooks for m in model.modules())
    root, copied = weakref.ref(model), copy.deepcopy(model)
    del model, before; gc.collect()
    assert root() is None and isinstance(copied.bn1(torch.rand(2, 8, 4, 4)), torch.Tensor)

@pytest.mark.parametrize('change', ['weights', 'statistics', 'head', 'layer', 'hook', 'float64'])
def test_what_changes_between_two_attacks_is_seen(change):
    model, x = net_with_random_bn(lambda: cifar_resnet18(10, 1/8)).eval(), torch.rand(4, 3, 32, 32)
    with frozen(model), folded(model, x): old = model(x)
    with torch.no_grad():
        # `.data`, as fastai's optimisers write: no version counter tells
        if change == 'weights': model.layer2[0].conv1.weight.data.mul_(1.5)
        if change == 'statistics': model.bn1.running_var.mul_(3)
        if change == 'head': model.linear = nn.Linear(64, 10)
        if change == 'layer': model.bn1 = nn.BatchNorm2d(8).eval(); model.bn1.bias.fill_(.3)
        if change == 'hook': model.bn1.register_forward_hook(lambda m, i, o: 2*o)
        if change == 'float64': model.double(); x = x.double()
    with frozen(model):
        want = model(x)
        with folded(model, x): got = model(x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert change == 'float64' or (want - old).abs().max() > 1e-2

def test_activation_in_place_before_batchnorm():
    """As in the head of `vision_learner`: no fold across it, though while the statistics are the initial ones a fold
    would do no harm"""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(inplace=True), nn.BatchNorm1d(16),
                          nn.Linear(16, 10)).eval()
    x, y = torch.rand(8, 3, 2, 2), torch.arange(8)
    with frozen(model), folded(model, x): model(x)
    nn.init.constant_(model[3].running_mean, .5); nn.init.constant_(model[3].running_var, 3.)
    with frozen(model):
        plain = logits_and_grad(model, x, y)
        with folded(model, x): fast = logits_and_grad(model, x, y)
    for f,p in zip(fast, plain): torch.testing.assert_close(f, p)

@pytest.mark.parametrize('gamma', [1., 0.])
def test_wrong_fold_is_found_out_in_a_new_network(gamma, monkeypatch):
    "A new BatchNorm changes nothing, and one of weight 0 hides all, so that a wrong fold would agree"
    from rkd_fastai.speed import _FastLayer, _FastLayers, _Weights
    model, x = (nn.Sequential(nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32, eps=1e-12), nn.Flatten(),
                              nn.Linear(32*36, 10)), torch.rand(4, 3, 8, 8))
    nn.init.constant_(model[1].weight, gamma)
    before = copy.deepcopy(model.state_dict())
    assert _fast_layers(copy.deepcopy(model).eval(), x)
    right = _Weights.__init__ # as without BatchNorm
    def without_bn(self, layers, bf16): right(self, _FastLayers(_FastLayer(s.layer) for s in layers), bf16)
    monkeypatch.setattr(_Weights, '__init__', without_bn)
    assert _fast_layers(model.eval(), x) == []
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())

def test_wrong_fold_is_found_out(monkeypatch):
    "Stand-ins that compute something else are not worn"
    from rkd_fastai.speed import _Weights
    right = _Weights.fold
    monkeypatch.setattr(_Weights, 'fold', lambda self: (right(self), torch._foreach_mul_(self.weights, 1.2)))
    assert _fast_layers(net_with_random_bn(lambda: cifar_resnet18(10, 1/8)).eval(), torch.rand(4, 3, 32, 32)) == []

def test_under_autocast():
    "As fastai's mixed precision does it: the forward pass inside, the backward pass outside"
    model = net_with_random_bn(lambda: cifar_resnet18(10, 1/8)).eval()
    x, y = torch.rand(16, 3, 32, 32), torch.arange(16) % 10
    def grad():
        xi = x.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16): logits = model(xi)
        return torch.autograd.grad(F.cross_entropy(logits.float(), y, reduction='sum'), xi)[0]
    with frozen(model):
        plain = grad()
        with folded(model, x): fast = grad()
    assert (plain.sign() == fast.sign()).float().mean() > .9 # two roundings to bfloat16
    with torch.autocast('cpu', torch.bfloat16): assert PGD()(model, x, y).isfinite().all()

def test_trying_the_fast_layers_draws_no_random_numbers():
    class Noisy(nn.Module):
        def __init__(self): super().__init__(); self.net = cifar_resnet18(10, 1/8)
        def forward(self, x): return self.net(x + torch.randn_like(x))
    model, before = Noisy().eval(), torch.get_rng_state()
    assert _fast_layers(model, torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))) == []
    assert torch.equal(before, torch.get_rng_state())

def test_teacher_is_folded_and_says_the_same():
    nets, x = [net_with_random_bn(lambda: cifar_resnet18(10, 1/8)).eval(),
               net_with_random_bn(lambda: wide_resnet(10, 1)).eval()], torch.rand(8, 3, 32, 32)
    want = sum(n(x).softmax(1) for n in nets)/2
    teacher = Teacher(nets)
    for t in (teacher, Teacher(teacher)): torch.testing.assert_close(t.probs(x), want.detach(), rtol=1e-4, atol=1e-5)
    assert robust_flags(teacher, x, want.argmax(1), PGD(1/255, steps=1)).any()

def test_inference_mode():
    model, x, y = net_with_random_bn(lambda: cifar_resnet18(10, 1/8)).eval(), torch.rand(4, 3, 32, 32), torch.arange(4)
    teacher = Teacher(model)
    with torch.inference_mode(): probs = teacher.probs(x); x_adv = PGD()(model, x, y)
    torch.testing.assert_close(probs.clone(), teacher.probs(x), rtol=1e-4, atol=1e-5)
    assert (x_adv != x).any()

def test_a_network_that_chooses_its_batchnorm():
    "AdvProp's two BatchNorms, one for attacked images: each pass leaves one of them out, and nothing is folded"
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.adv,self.conv,self.clean_bn,self.adv_bn,self.head = (
                False, nn.Conv2d(1,16,3), nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.Linear(16*36,10))
        def forward(self, x):
            return self.head(F.relu((self.adv_bn if self.adv else self.clean_bn)(self.conv(x))).flatten(1))
    torch.manual_seed(0)
    net,x = Two(), torch.rand(8,1,8,8)
    for net.adv in (False, True): net(x) # in train mode: each has its statistics
    net.eval()
    for net.adv in (False, True, False):
        with torch.no_grad(): plain = net(x)
        with frozen(net): assert not any(s.bn for s in _fast_layers(net, x))
        with torch.no_grad(), frozen(net), folded(net, x):
            torch.testing.assert_close(net(x), plain, rtol=1e-4, atol=1e-4)

class Way(Enum): straight, doubled = 0, 1

class ManyWays(nn.Module):
    "Every way calls each layer once: what lies between convolution and BatchNorm is chosen"
    elsewhere = SimpleNamespace(way=0) # out of sight
    def __init__(self):
        super().__init__()
        self.conv,self.bn,self.head = nn.Conv2d(1,16,3), nn.BatchNorm2d(16), nn.Linear(16*36,10)
        self.number,self.factor,self.name,self.member,self.several = 0,1.,None,Way.straight,[1,1]
    def forward(self, x):
        h = self.conv(x)
        if (self.number or self.name or self.factor != 1. or self.member is Way.doubled or self.several[1] > 1
            or self.elsewhere.way or x.mean() > .8):
            h = 2*h
        return self.head(F.relu(self.bn(h)).flatten(1))

def set_number(net, x): net.number = np.int64(1)
def set_factor(net, x): net.factor = 2.
def set_name(net, x): net.name = 'doubled'
def set_member(net, x): net.member = Way.doubled
def set_several(net, x): net.several = [1,2]
def set_elsewhere(net, x): net.elsewhere.way = 1
def brighten(net, x): x.copy_(.9 + x/10)
def hook_before(net, x): net.bn.register_forward_pre_hook(lambda m, i: (2*i[0],))
def replace(net, x): net.conv = nn.Sequential(net.conv, nn.ReLU())
def swap_class(net, x): net.bn.forward = lambda h: 2*h
def no_statistics(net, x): net.bn.running_mean = net.bn.running_var = None

@pytest.mark.parametrize('change', [set_number, set_factor, set_name, set_member, set_several, set_elsewhere, brighten,
                                    hook_before, replace, swap_class, no_statistics], ids=lambda f: f.__name__)
def test_a_network_that_goes_another_way(change, monkeypatch):
    "The attack is that on a network which has never been folded"
    monkeypatch.setattr(ManyWays, 'elsewhere', SimpleNamespace(way=0))
    net,x,y = ManyWays(), torch.rand(32,1,8,8), torch.arange(32) % 10
    for _ in range(3): net(torch.rand(32,1,8,8)*2)
    net.eval()
    attack = PGD(.05, steps=2, random_start=False)
    attack(net, x, y)
    with frozen(net): assert [s.bn for s in _fast_layers(net, x)] == [net.bn]
    change(net, x)
    got = attack(net, x, y)
    attack.folds = False
    assert (got == attack(net, x, y)).float().mean() > .99

@pytest.fixture
def trials(monkeypatch):
    "How often fast layers were looked for"
    seen,find = [],fast._find_fast_layers
    monkeypatch.setattr(fast, '_find_fast_layers', lambda *args: seen.append(1) or find(*args))
    return seen

class Counting(ManyWays):
    "Each pass is counted"
    def forward(self, x): self.number += 1; return super().forward(x)
class Remembering(ManyWays):
    "The last batch's size is kept"
    def forward(self, x): self.bs = len(x); return super().forward(x)
class FirstPass(ManyWays):
    "The first pass is another one"
    def __init__(self): super().__init__(); self.number = 1
    def forward(self, x): out = super().forward(x); self.number = 0; return out

def still(net, i): pass
def switched(net, i): net.number = i % 2
def counted(net, i): net.steps = i

@pytest.mark.parametrize('cls,between,most,folds', [(ManyWays, still, 1, True), (Counting, still, 2, False),
                                                    (Remembering, still, 4, True), (FirstPass, still, 2, True),
                                                    (ManyWays, switched, 2, True),
                                                    (ManyWays, counted, 8 + 64//16, None)])
def test_trials_are_few(cls, between, most, folds, trials):
    "Whatever becomes of a network's settings; and what is the same each time keeps no network from being folded"
    net,x,found = cls().eval(), torch.rand(8,1,8,8), []
    nn.init.normal_(net.bn.running_mean)
    with frozen(net):
        for i in range(64):
            between(net, i)
            with folded(net, x): found.append(net.bn.forward.__name__ == '_same'); net(x)
    assert 1 <= len(trials) <= most and folds in (found[-2], None)

class Launches(TorchDispatchMode):
    "Count the operators that start work on a GPU"
    views = {'detach','view','slice','t','expand','transpose','promote_types','alias','_local_scalar_dense'}
    n = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.n += str(f).split('.')[1] not in self.views
        return f(*args, **(kwargs or {}))

def test_a_fold_takes_few_operators():
    "Eagerly, a GPU waits for the launch of each operator; it was 976 for the attack and 225 for the teacher"
    net,x,y = net_with_random_bn(lambda: cifar_resnet18(10)),torch.rand(2, 3, 8, 8),torch.tensor([1, 2])
    attack,teacher = PGD(),Teacher(PixelModel(net, [.5]*3, [.2]*3))
    for _ in range(2): attack(net, x, y); teacher.probs(x)
    with Launches() as in_attack: attack(net, x, y)
    with Launches() as in_teacher: teacher.probs(x)
    assert 700 < in_attack.n <= 830 and 50 < in_teacher.n <= 65, (in_attack.n, in_teacher.n)

class Strided(nn.Module):
    "A network whose shortcut is a strided 1×1 convolution of few channels, as in many networks for CIFAR-10"
    def __init__(self, n=8):
        super().__init__()
        self.conv,self.short = nn.Conv2d(3, n, 3, 1, 1),nn.Conv2d(n, 2*n, 1, 2)
        self.bn,self.head = nn.BatchNorm2d(2*n),nn.Linear(2*n, 10)
    def forward(self, x): return self.head(F.relu(self.bn(self.short(F.relu(self.conv(x))))).mean((2,3)))

def test_a_layer_that_would_end_the_process():
    """PyTorch 2.15 corrupts the memory where it computes the gradient for such weights in the channels-last format,
    which the compiler chooses as well: these networks keep their format and train uncompiled"""
    code = """
        import torch, warnings, sys
        sys.path[:0] = ['tests']
        from test_speed import Strided
        from rkd_fastai.speed import channels_last, compiled
        net,x = Strided(),torch.rand(4, 3, 64, 64)
        with channels_last(net, x), warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            assert not net.conv.weight.is_contiguous(memory_format=torch.channels_last)
            for _ in range(5):
                with compiled(net): net(x).sum().backward()
        print(*(w.message for w in ws))
    """
    assert python(code).startswith('`compile=True` is not used for the training step: ')
    assert fast.has_unsafe_conv(Strided()) and not fast.has_unsafe_conv(Strided(16))
    assert not any(fast.has_unsafe_conv(net) for net in (cifar_resnet18(10, 1/16), wide_resnet(10, 1)))

@pytest.mark.filterwarnings('ignore:.*torch.jit.trace.*')
def test_the_shortcut_is_a_strided_convolution():
    "Our ResNet-18 takes every second pixel and convolves it, which is the same"
    block,x = cifar_resnet18(10, 1/8).layer2[0].eval(),torch.rand(2, 8, 7, 9)
    main = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    short = block.shortcut[1](F.conv2d(x, block.shortcut[0].weight, stride=2))
    torch.testing.assert_close(block(x), F.relu(main + short))
    net = cifar_resnet18(10, 1/16).double().eval()
    x = torch.rand(2, 3, 9, 8, dtype=torch.double, requires_grad=True)
    assert torch.equal(torch.jit.script(net)(x), net(x)) and torch.equal(torch.jit.trace(net, x)(x), net(x))
    torch.func.jvp(net, (x.detach(),), (torch.ones_like(x),))
    each = torch.func.vmap(torch.func.grad(lambda x: net(x[None]).sum()))(x.detach())
    torch.testing.assert_close(each, torch.autograd.grad(net(x).sum(), x)[0])
    every = lambda x: _EveryNth.apply(x, 2).square()
    for x in (x, x.to(memory_format=torch.channels_last)):
        assert torch.autograd.gradcheck(every, x) and torch.autograd.gradgradcheck(every, x)

@pytest.mark.parametrize('opt_func', [partial(OptimWrapper, opt=torch.optim.AdamW, fused=True), Adam])
@pytest.mark.parametrize('first', ['natural','robust'])
def test_the_optimiser_has_the_format_of_the_weights(opt_func, first, make_learner, make_dls):
    "Its values from a fit in another format, too, and back again"
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    learn,formats = make_learner(make_dls(n=64), net, opt_func=opt_func),[]
    def values():
        opt = learn.opt
        while hasattr(opt, 'opt'): opt = opt.opt
        return [v for v in opt.state[net[1].weight].values() if torch.is_tensor(v) and v.ndim == 4]
    class Look(Callback):
        order,run_valid = 3000,False
        def after_step(self): formats.append({v.stride() for v in [net[1].weight, *values()]})
    for way in ([first, 'natural','robust'] if first == 'robust' else [first, 'robust','natural']):
        if way == 'robust': learn.to_adversarial(PGD(.1, steps=1))
        else: learn.to_natural()
        learn.fit(1, cbs=Look())
    assert {len(f) for f in formats} == {1} and len(set.union(*formats)) == 2
    assert {v.stride() for v in [net[1].weight, *values()]} == {(36, 9, 3, 1)}

def test_shared_memory_is_left_alone():
    "Another process, or another parameter, would no longer see the weights"
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    both = nn.Parameter(torch.rand(8, 4, 3, 3))
    for change in (nn.Module.share_memory, lambda net: setattr(net[1], 'weight', nn.Parameter(both.detach()[4:]))):
        other = copy.deepcopy(net)
        change(other)
        ptr = other[1].weight.data_ptr()
        with fast.channels_last(other, torch.rand(2, 3, 8, 8)): assert other[1].weight.data_ptr() == ptr
