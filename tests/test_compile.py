"""`faster`: what is compiled or computed in bfloat16 gives the same attacks and the same training, and costs a
warning at worst."""
import copy, functools, gc, pickle, warnings, weakref

import pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.vision.all import Callback

from rkd_fastai import speed as fast
from rkd_fastai.attacks.pgd import FFGSM, FGSM, PGD
from rkd_fastai.callback.adversarial import AdversarialTraining, TRADES
from rkd_fastai.callback.distill import AKDCallback, ARDCallback, CKDCallback, RSLADCallback
from rkd_fastai.core import frozen
from rkd_fastai.evaluation.robustness import robust_accuracy
from rkd_fastai.speed import compiled, faster, folded
from rkd_fastai.learner import rkd_learner
from rkd_fastai.models import cifar_resnet18
from rkd_fastai.teachers import Teacher
from test_speed import models, net_with_random_bn

ATTACK = PGD(.1, steps=2, random_start=False)
methods = dict(at=lambda t, **kw: AdversarialTraining(ATTACK, **kw),
               trades=lambda t, **kw: TRADES(PGD(.1, steps=2, objective='kl'), **kw),
               akd=lambda t, **kw: AKDCallback(t, attack=ATTACK, **kw),
               rslad=lambda t, **kw: RSLADCallback(t, attack=ATTACK, **kw),
               ard=lambda t, **kw: ARDCallback(t, attack=ATTACK, **kw),
               ckd=lambda t, **kw: CKDCallback(t, **kw))

@pytest.fixture
def shapes(monkeypatch):
    """Traces without generating code, which takes a tenth of the time, and lists the (module, shape) of every
    compiled call"""
    calls, real, call = [], torch.compile, fast._Compiled.__call__
    monkeypatch.setattr(torch, 'compile', functools.partial(
        lambda fn, mode=None, **kw: real(fn, backend='aot_eager', **kw)))
    monkeypatch.setattr(fast._Compiled, '__call__', lambda self, model, x: (
        calls.append((type(model).__name__, model.training, tuple(x.shape))), call(self, model, x))[1])
    torch._dynamo.reset()
    yield calls
    torch._dynamo.reset()

def weights(model): return [p.detach().clone() for p in model.state_dict().values()]

def fit(make_learner, dls, model, cb, **kw):
    learn = make_learner(dls, model, cbs=cb, **kw)
    torch.manual_seed(5)
    learn.fit(2, .01)
    return learn

# --- compiled ---

@pytest.mark.few(3)
@pytest.mark.parametrize('name', methods)
def test_compiled_training_is_the_same(name, shapes, make_learner, make_dls, tiny_net):
    "With a last batch that is smaller, dropout, normalisation, BatchNorm statistics"
    dls = make_dls(n=80, shuffle=False, stats=([.3], [.25]))
    nets = [fit(make_learner, dls, tiny_net(dropout=.2), methods[name](tiny_net(seed=7), compile=c)).model
            for c in (False, True)]
    for a,b in zip(*map(weights, nets)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert {s[0] for _,_,s in shapes} == {32}, 'the last batch, of 16, and validation run uncompiled'
    kinds = {(m, mode) for m,mode,_ in shapes}
    assert ('Sequential', True) in kinds and (name == 'ckd' or ('PixelModel', False) in kinds)

@pytest.mark.slow
def test_compiled_with_the_real_compiler(make_learner, make_dls):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                             nn.Linear(36, 10))
    dls, nets = make_dls(n=64, shuffle=False), []
    for compile in (False, True):
        nets.append(fit(make_learner, dls, net(), methods['akd'](net(), compile=compile)).model)
    for a,b in zip(*map(weights, nets)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

@pytest.mark.slow
def test_compiled_gradient_signs():
    model, x, y = net_with_random_bn(lambda: cifar_resnet18(10, 1/8)).eval(), torch.rand(8, 3, 32, 32), torch.arange(8)
    with frozen(model):
        def grad():
            xi = x.clone().requires_grad_()
            with folded(model, x): return torch.autograd.grad(F.cross_entropy(model(xi), y, reduction='sum'), xi)[0]
        plain = grad()
        with faster(compile=True): got = grad()
    assert (plain.sign() == got.sign()).float().mean() >= .999

def failing(where):
    """A compiler that fails: at once, as on a Python that it does not know, when it is first called, or in the
    backward pass"""
    def compile(fn, **kwargs):
        if where == 'at once': raise RuntimeError('backend failed')
        class Backward(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x): return x.clone()
            @staticmethod
            def backward(ctx, g): raise RuntimeError('backend failed')
        def call(model, x):
            if where == 'forward': raise RuntimeError('backend failed')
            return Backward.apply(fn(model, x))
        return call
    return compile

@pytest.mark.parametrize('where', ['at once', 'forward', 'backward'])
@pytest.mark.parametrize('name', ['akd', 'rslad', 'trades'])
def test_failing_compiler(name, where, monkeypatch, make_learner, make_dls, tiny_net):
    "One warning, and training goes on as if nothing had been asked: to the bit, statistics and random numbers included"
    dls = make_dls(shuffle=False)
    want = fit(make_learner, dls, tiny_net(dropout=.2), methods[name](tiny_net(seed=7)))
    monkeypatch.setattr(torch, 'compile', failing(where)); fast._warned.clear()
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        got = fit(make_learner, dls, tiny_net(dropout=.2), methods[name](tiny_net(seed=7), compile=True))
    assert all(torch.equal(a, b) for a,b in zip(weights(got.model), weights(want.model)))
    assert ([str(w.message) for w in ws if 'compile' in str(w.message)]
            == ['`compile=True` failed, so the model runs uncompiled (RuntimeError: backend failed)'])

def test_no_compiler_at_all():
    "As on a machine without g++"
    from torch._inductor import config
    fast._warned.clear(); torch._dynamo.reset()
    model, x, y = (
        net_with_random_bn(lambda: nn.Sequential(nn.Conv2d(3, 5, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(500, 10))),
        torch.rand(4, 3, 32, 32), torch.arange(4))
    want = ATTACK(model, x, y)
    with (config.patch({'cpp.cxx': ('no-such-compiler',), 'fx_graph_cache': False}),
          pytest.warns(UserWarning, match='`compile=True` failed'), faster(compile=True)):
        got = ATTACK(model, x, y)
    assert torch.equal(got, want)

def test_what_is_compiled_is_freed(shapes):
    model, x, y = net_with_random_bn(lambda: cifar_resnet18(10, 1/16)), torch.rand(4, 3, 32, 32), torch.arange(4)
    with faster(compile=True): ATTACK(model, x, y)
    with compiled(model): copied, pickled = copy.deepcopy(model), pickle.dumps(model)
    assert shapes and not any('forward' in vars(m) for m in model.modules())
    for other in (copied, pickle.loads(pickled)): assert torch.equal(other.eval()(x), model.eval()(x))
    root = weakref.ref(model)
    del model, copied, other; torch._dynamo.reset(); gc.collect()
    assert root() is None

def test_many_models_are_compiled(shapes):
    "PyTorch keeps eight compilations of a function at most; each model has its own"
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    for i in range(12):
        model = nn.Sequential(nn.Conv2d(1, 4+i, 3), nn.Flatten(), nn.Linear(36*(4+i), 10))
        torch._dynamo.utils.counters.clear()
        with faster(compile=True): ATTACK(model, x, y)
        assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1

def test_each_kind_of_call_has_its_own_compilations(shapes):
    """Four batch sizes, with gradients, without, and in bfloat16 are more than the eight that PyTorch keeps of a
    function"""
    model, net = (net_with_random_bn(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 10))
                                     ).eval(), fast._Compiled())
    with frozen(model), warnings.catch_warnings():
        warnings.simplefilter('error')
        for n in (1, 2, 3, 4):
            x = torch.rand(n, 3, 32, 32)
            net(model, x.clone().requires_grad_())
            with torch.no_grad():
                net(model, x)
                with torch.autocast('cpu', torch.bfloat16): net(model, x)
    assert list(net.tried.values()) == [True]*12 and torch._dynamo.utils.counters['stats']['unique_graphs'] >= 12

def test_data_parallel_trains_as_it_is(shapes, make_learner, make_dls, tiny_net):
    "Replicas would all run the first one's weights"
    learn = make_learner(make_dls(), nn.DataParallel(tiny_net()), cbs=methods['at'](None, compile=True))
    learn.fit(1)
    assert shapes and not any(training for _,training,_ in shapes)

@pytest.mark.parametrize('where', ['forward', 'backward'])
def test_interrupted_step_leaves_no_compiled_model(where, shapes, make_learner, make_dls, tiny_net):
    "No event comes after it: what is exported next, or made a Teacher of, is the network itself"
    class Stops(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x): return self.net(x)
    learn = make_learner(make_dls(), Stops(tiny_net()), cbs=methods['rslad'](tiny_net(seed=7), compile=True))
    def stop(*args): raise KeyboardInterrupt
    real = fast._Compiled.__call__
    with pytest.MonkeyPatch.context() as mp, pytest.raises(KeyboardInterrupt):
        if where == 'forward':
            mp.setattr(fast._Compiled, '__call__',
                       lambda self, model, x: stop() if model.training else real(self, model, x))
        else: mp.setattr(torch.Tensor, 'backward', stop)
        learn.fit(1)
    assert not any('forward' in vars(m) for m in learn.model.modules())

@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'before_step'])
def test_interrupted_while_compiled(event, shapes, make_learner, make_dls, tiny_net):
    "The next use of the Learner finds its model as it was"
    learn = make_learner(make_dls(), tiny_net(), cbs=methods['akd'](tiny_net(seed=7), compile=True))
    class Stop(Callback): pass
    setattr(Stop, event, lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())
    learn.remove_cb(Stop)
    pickle.dumps(learn.model)
    learn.validate()
    assert 'forward' not in vars(learn.model)
    learn.fit(1)

def test_second_fit_compiles_nothing(shapes, make_learner, make_dls, tiny_net):
    learn, graphs = make_learner(make_dls(), tiny_net(), cbs=methods['akd'](tiny_net(seed=7), compile=True)), []
    for _ in range(2):
        torch._dynamo.utils.counters.clear()
        learn.fit(1)
        graphs.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
    assert graphs == [3, 0] # attack, teacher, training step

def test_hooked_model_is_left_alone(shapes):
    model, seen = net_with_random_bn(lambda: cifar_resnet18(10, 1/16)), []
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    model.register_forward_hook(lambda m, i, o: seen.append(1))
    with faster(compile=True): ATTACK(model, x, y)
    assert len(seen) >= 2 and not shapes

def test_users_own_compilation(shapes):
    "A model that is compiled already is folded and attacked like any other"
    model, x, y = net_with_random_bn(lambda: cifar_resnet18(10, 1/16)).eval(), torch.rand(4, 3, 32, 32), torch.arange(4)
    own = torch.compile(model)
    for _ in range(2):
        assert torch.equal(ATTACK(own, x, y), ATTACK(model, x, y))
        with torch.no_grad(): model.conv1.weight.mul_(1.2)

# --- in bfloat16 ---

@pytest.mark.few(3)
@pytest.mark.parametrize('name', models)
def test_bf16_gradient(name):
    "Nearly the float32 one, on every architecture"
    model, x, y = net_with_random_bn(models[name][0]).eval(), torch.rand(8, 3, 32, 32), torch.arange(8)
    def grad():
        xi = x.clone().requires_grad_()
        with folded(model, x): logits = model(xi)
        return torch.autograd.grad(F.cross_entropy(logits.float(), y, reduction='sum'), xi)[0]
    with frozen(model):
        plain = grad()
        with faster(bf16=True): half = grad()
    assert half.dtype == torch.float32 and half.isfinite().all()
    if name == 'torchvision vit, no BatchNorm': return # its head starts at zero: no gradient
    assert (F.cosine_similarity(*(F.normalize(g.flatten(), dim=0, eps=0) for g in (plain, half)), 0) > .9
            and not torch.equal(plain, half))

@pytest.mark.parametrize('attack', [PGD(.1), PGD(.7, norm='L2'), PGD(.1, restarts=2), PGD(.1, objective='kl'),
                                    FGSM(.1), FFGSM(.1)], ids=repr)
def test_bf16_attack_is_as_strong(attack, robust_net, test_images, snapshot):
    x, y = test_images
    targ, accs, before = F.one_hot(y, 10).float() if attack.objective == 'kl' else y, [], snapshot.take(robust_net)
    for bf16 in (False, True):
        torch.manual_seed(0)
        with faster(bf16=bf16): x_adv = attack(robust_net, x, targ)
        accs.append((robust_net(x_adv).argmax(1) == y).float().mean().item())
    assert abs(accs[0] - accs[1]) <= .0041 and accs[0] < .95 # two of 500 images
    assert snapshot.same(before, snapshot.take(robust_net)) and x_adv.dtype == torch.float32

def test_bf16_leaves_float64_alone():
    model = net_with_random_bn(lambda: cifar_resnet18(10, 1/16)).double()
    x, y = torch.rand(4, 3, 32, 32).double(), torch.arange(4)
    with faster(bf16=True): assert torch.equal(ATTACK(model, x, y), ATTACK(model, x, y))

def test_bf16_reaches_attack_and_teacher_but_not_training(make_learner, make_dls, tiny_net):
    seen = {}
    class Watched(nn.Module):
        def __init__(self, name, net): super().__init__(); self.name,self.net = name,net
        def forward(self, x):
            out = self.net(x)
            seen.setdefault((self.name, self.training), set()).add(out.dtype)
            return out
    fit(make_learner, make_dls(), Watched('student', tiny_net()),
        methods['akd'](Watched('teacher', tiny_net(seed=7)), bf16=True))
    half, full = torch.bfloat16, torch.float32
    assert seen[('student', True)] == {full}
    # the attack; validation and the trial of the fast layers
    assert half in seen[('student', False)] and full in seen[('student', False)]
    assert half in seen[('teacher', False)]

def test_nothing_is_faster_outside(robust_net, test_images):
    x, y = test_images
    with faster(bf16=True): half = ATTACK(robust_net, x, y)
    with pytest.raises(KeyError), faster(bf16=True): raise KeyError
    assert (not torch.equal(half, ATTACK(robust_net, x, y))
            and torch.equal(ATTACK(robust_net, x, y), ATTACK(robust_net, x, y)))

@pytest.mark.slow
def test_bf16_verdict_on_real_images():
    "The bar: a trained student's robust accuracy differs by less than 0.3 points"
    from fastai.vision.all import Learner
    from rkd_fastai.data.benchmarks import fashion_sample_dls
    from rkd_fastai.data.images import pixel_data
    from rkd_fastai.schedules import sgd_nesterov
    from rkd_fastai.normalization import pixel_model
    learn = Learner(fashion_sample_dls(), cifar_resnet18(10, 1/8, 1),
                    opt_func=sgd_nesterov).to_adversarial(PGD(steps=3))
    with learn.no_bar(), learn.no_logging(): learn.fit_rkd(8)
    x, y = pixel_data(learn)
    accs = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        with faster(bf16=bf16): accs.append(robust_accuracy(pixel_model(learn), x, y, PGD(steps=20)))
    assert abs(accs[0] - accs[1]) < .003 and .3 < accs[0] < .9

# --- the settings ---

def test_settings_reach_the_callback(make_dls, tiny_net, make_learner):
    learn = rkd_learner(make_dls(), tiny_net(), tiny_net(seed=7), compile=True, bf16=True)
    assert learn.akd.compile and learn.akd.bf16
    learn.to_adversarial(compile=True)
    assert learn.adversarial_training.compile and not learn.adversarial_training.bf16
    learn.to_rkd(tiny_net(seed=7), 'rslad', bf16=True)
    assert learn.rslad.bf16 and not learn.rslad.compile
    with pytest.raises(TypeError): learn.to_rkd(tiny_net(seed=7), fp16=True)

def test_teacher_is_faster_too(tiny_net):
    x, nets = torch.rand(16, 1, 8, 8), [tiny_net(seed=s) for s in (1, 2)]
    teacher = Teacher(nets)
    want = teacher.probs(x)
    with faster(bf16=True): got = teacher.probs(x)
    assert got.dtype == torch.float32 and not torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=.05, atol=.01)
    torch.testing.assert_close(got.sum(1), torch.ones(16))
