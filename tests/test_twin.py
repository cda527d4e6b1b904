"The twin on which an attack runs: the same network, but what happens to it leaves the network alone."
import copy, gc, weakref
from threading import Event, Thread

import pytest, torch, torch.nn as nn, torch.nn.functional as F

from rkd_fastai.attacks.pgd import PGD, Attack
from rkd_fastai.core import PixelModel, frozen
from rkd_fastai.evaluation.robustness import robust_flags
from rkd_fastai.models import cifar_resnet18
from rkd_fastai.twin import _twins, attackable

def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1,8,3,2,1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128,10))
    for _ in range(3): net(torch.rand(32,1,8,8)) # statistics that differ from those of a batch
    return net

x,y = torch.rand(8,1,8,8, generator=torch.Generator().manual_seed(0)), torch.arange(8)

class Waits(Attack):
    "An attack that waits for a signal"
    def __init__(self): self.inside,self.go = Event(),Event()
    def perturb(self, model, x, targ):
        self.inside.set()
        assert self.go.wait(30)
        self.out = model(x)
        return x

def test_overlapping_attacks_leave_the_network_alone():
    "Whichever ends first, the network is in train mode all the time, and a prediction in another thread is right"
    net = small()
    with frozen(net): want = net(x)
    mean,attacks,threads = net[1].running_mean.clone(), [Waits(), Waits()], []
    for a in attacks:
        threads.append(Thread(target=a, args=(net, x, y)))
        threads[-1].start()
        assert a.inside.wait(30)
    assert all(m.training for m in net.modules()) and all(p.requires_grad for p in net.parameters())
    with frozen(net): assert torch.equal(net(x), want)
    for a,t in zip(attacks, threads): a.go.set(); t.join()
    assert net.training and torch.equal(net[1].running_mean, mean)
    for a in attacks: torch.testing.assert_close(a.out, want, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
def test_an_interrupted_attack_leaves_nothing_behind(error, snapshot):
    class Fails(Attack):
        def perturb(self, model, x, targ): raise error
    net = small()
    before = snapshot.take(net)
    with pytest.raises(error): Fails()(net, x, y)
    assert snapshot.same(before, snapshot.take(net))
    PGD(.1)(net, x, y)
    assert len(_twins[net]) == 1 # the twin is not busy any more

def test_an_attack_within_an_attack():
    "On the network itself, and on what the attack was given"
    net,pgd = small(), PGD(.1, steps=3, random_start=False)
    class Within(Attack):
        def perturb(self, model, x, targ):
            fast = model[0].forward
            self.inner = [pgd(m, x, targ) for m in (net, model)]
            assert not model.training and model[0].forward is fast
            with attackable(model, x) as same: assert same is model
            model[0].register_forward_hook(lambda m, i, o: 0*o) # an attack may look into its network
            assert not net[0]._forward_hooks
            model[0]._forward_hooks.clear()
            return pgd.perturb(model, x, targ)
    within,want = Within(), pgd(net, x, y)
    with attackable(net, x) as twin, attackable(twin, x) as same: assert same is twin
    assert torch.equal(within(net, x, y), want) and all(torch.equal(o, want) for o in within.inner) and net.training

class Tied(nn.Module):
    "Attributes that lead to modules in all ways that have a twin: lists, dicts and bound methods; tied weights"
    def __init__(self):
        super().__init__()
        self.conv,self.bn,self.head = nn.Conv2d(1,8,3,2,1), nn.BatchNorm2d(8), nn.Linear(128,10)
        self.again = nn.Linear(128,10); self.again.weight = self.head.weight
        self.steps,self.by_name,self.act = [self.conv], dict(head=[(self.head,)]), self.activation
        self.factor,self.shift = 1.,torch.zeros(10)
    factor = 4.
    def activation(self, x): return F.relu(self.bn(x))*self.factor
    def forward(self, x):
        h = self.act(self.steps[0](x)).flatten(1)
        return self.by_name['head'][0][0](h) + self.again(h) + self.shift

def weights(net): net.conv.weight.data.mul_(1.5)
def parameter(net): net.head.weight = net.again.weight = nn.Parameter(net.head.weight*2)
def storage(net): net.head.bias.data = torch.ones(10)
def statistics(net): net.bn.running_var.mul_(3)
def new_statistics(net): net.bn.running_mean = net.bn.running_mean + 1
def layer(net): net.steps[0] = net.conv = nn.Conv2d(1,8,3,2,1)
def number(net): net.factor = 2.
def deleted(net): del net.factor
def tensor(net): net.shift = torch.arange(10.)
def in_place(net): net.shift.add_(torch.arange(10.))
def hook(net): net.bn.register_forward_hook(lambda m, i, o: 2*o)
def unhooked(net): net.handle.remove()
def method(net): net.act = lambda h: 3*F.relu(h)

@pytest.mark.parametrize('change', [weights, parameter, storage, statistics, new_statistics, layer, number, deleted,
                                    tensor, in_place, hook, unhooked, method], ids=lambda f: f.__name__)
def test_the_twin_follows_the_network(change):
    "And gradients of the images are those of the network; the network's own gradients stay None"
    torch.manual_seed(0)
    net = Tied()
    net(x)
    net.handle = net.head.register_forward_hook(lambda m, i, o: o + 1)
    old = None
    for step in range(2):
        if step:
            with torch.no_grad(): change(net)
        with frozen(net):
            x1 = x.clone().requires_grad_()
            want = net(x1)
            grad, = torch.autograd.grad(F.cross_entropy(want, y), x1)
        with attackable(net, x) as twin:
            x2 = x.clone().requires_grad_()
            out = twin(x2)
            F.cross_entropy(out, y).backward()
        assert twin is not net and torch.equal(out, want) and torch.equal(x2.grad, grad)
        assert all(p.grad is None for p in net.parameters()) and net.training
        assert not step or (want - old).abs().max() > 1e-3
        old = want.detach()

class Closure(nn.Module):
    def __init__(self): super().__init__(); self.net = small(); self.f = lambda x: self.net(x)
    def forward(self, x): return self.f(x)
class NoNew(nn.Module):
    "Its forward pass fails without an attribute that the class sets aside"
    def __init__(self): super().__init__(); self.net = small(); registry[id(self)] = self.net
    def forward(self, x): return registry[id(self)](x)
registry = {}

@pytest.mark.parametrize('make', [Closure, NoNew, lambda: torch.jit.script(small()),
                                  lambda: nn.DataParallel(small())], ids=['closure', 'registry', 'script', 'parallel'])
def test_a_network_without_a_twin_is_frozen(make):
    net = make().train()
    with attackable(net, x) as model: assert model is net and not net.training
    assert net.training
    x_adv = PGD(.1, random_start=False)(net, x, y)
    assert (x_adv != x).any() and net.training

def test_a_closure_that_comes_later_is_found():
    "As the value of an attribute, and inside a list that stays the same object"
    class Ways(nn.Module):
        def __init__(self): super().__init__(); self.net,self.ways = small(),[F.relu, F.silu]
        def forward(self, x): return self.net(self.ways[0](x))
    net = Ways()
    with attackable(net, x) as twin: assert twin is not net
    net.ways[0] = lambda x: x + 0*net.net(x).sum()
    mean = net.net[1].running_mean.clone()
    with attackable(net, x) as model: assert model is net and model(x).isfinite().all()
    assert torch.equal(net.net[1].running_mean, mean) and net.training

def test_flags_in_another_thread_than_training():
    "`robust_flags` measures in eval mode while the network stays in train mode"
    net,seen = small(), []
    class Looks(PGD):
        def perturb(self, model, x, targ): seen.append((net.training, model.training)); return x
    with frozen(net): y = net(x).argmax(1)
    assert robust_flags(net, x, y, Looks()).all() and seen == [(True, False)]

def test_a_twin_lives_as_long_as_its_network():
    net = cifar_resnet18(10, 1/16, 1)
    model = PixelModel(net, .5, .5)
    with attackable(model, x) as twin: twin = weakref.ref(twin.model)
    with attackable(PixelModel(net, .2, .2), x) as other:
        assert other.model is twin() and other.mean.item() == pytest.approx(.2)
    root = weakref.ref(net)
    copied = copy.deepcopy(net)
    del net, model, other; gc.collect()
    assert root() is None and twin() is None and copied.training
