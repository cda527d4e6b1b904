"""On a GPU, `pytest -m cuda`: the same attacks and steps as on the CPU, memory that stays flat, runs that go
on, and a run from the command line."""
import copy, gc, json, warnings
import pytest, torch, torch.nn as nn
from fastai.vision.all import SGD, Callback, set_seed

from rkd_fastai import graphs
from rkd_fastai.all import *
from rkd_fastai.callback.adversarial import RobustCallback
from rkd_fastai.evaluation.robustness import measure_robustness
from rkd_fastai.speed import faster
from rkd_fastai.cli.main import main

pytestmark = pytest.mark.cuda

@pytest.fixture(autouse=True)
def exact():
    "Convolutions in whole float32, always by the same algorithm, so that what differs is ours"
    kept = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = (
        False, True, False)
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = kept

methods = dict(
    at=lambda t, a: AdversarialTraining(a), trades=lambda t, a: TRADES(a), akd=lambda t, a: AKDCallback(t, attack=a),
    rslad=lambda t, a: RSLADCallback(t, attack=a), ard=lambda t, a: ARDCallback(t, attack=a),
    ckd=lambda t, a: CKDCallback(t))
still = PGD(.1, steps=2, random_start=False)
fast = [{}, dict(compile=True), dict(bf16=True), dict(compile=True, bf16=True), dict(cuda_graph=True),
        dict(compile=True, bf16=True, cuda_graph=True)]

# --- teachers ---

def test_members_from_several_devices(make_dls, tiny_net):
    "Meet where the first is, and distil"
    t = Teacher([tiny_net(seed=1), tiny_net(seed=2).cuda()])
    assert t.probs(torch.rand(2, 1, 8, 8)).shape == (2, 10) and t.members[1].model[0].weight.device.type == 'cpu'
    rkd_learner(make_dls(), tiny_net(seed=3), t)

# --- attacks ---

@pytest.mark.parametrize('attack', [FGSM(.1), still, PGD(.1, steps=5, random_start=False, objective='cw'),
                                    PGD(.5, steps=5, norm='L2', random_start=False)], ids=repr)
def test_attacks_are_those_of_the_cpu(attack, robust_net, test_images):
    x, y = (t[:64] for t in test_images)
    want, got = attack(robust_net, x, y), attack(copy.deepcopy(robust_net).cuda(), x.cuda(), y.cuda())
    # the sign of a vanishing gradient is anyone's
    assert got.is_cuda and ((got.cpu() - want).abs() < 1e-4).float().mean() > .995

@pytest.mark.parametrize('kw', fast, ids=str)
def test_faster_attacks_find_as_much(kw, robust_net, test_images):
    net, (x, y) = copy.deepcopy(robust_net).cuda(), (t.cuda() for t in test_images)
    def stand(**kw):
        with faster(**kw): x_adv = still(net, x, y)
        assert (x_adv - x).abs().max() <= .1 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
        with torch.no_grad(): return (net(x_adv).argmax(1) == y).float().mean().item()
    assert abs(stand(**kw) - stand()) <= .01

@pytest.mark.parametrize('name', ['pgd20','pgd5x3','cw','apgd','square'])
def test_random_attacks(name, robust_net, test_images):
    "The same numbers from the same seed, and no random number of the user's is drawn"
    net, (x, y) = copy.deepcopy(robust_net).cuda(), (t[:128].cuda() for t in test_images)
    before = torch.cuda.get_rng_state()
    a, b = (measure_robustness(net, x, y, [name], .1, seed=5) for _ in range(2))
    assert a.results[name] == b.results[name] and torch.equal(before, torch.cuda.get_rng_state())
    cpu = measure_robustness(robust_net, x.cpu(), y.cpu(), [name], .1, seed=5)
    assert abs(a.results[name] - cpu.results[name]) < .02 # the GPU has other random numbers

@pytest.mark.parametrize('kw', [dict(), dict(fast=True)], ids=['plain','fast'])
def test_autoattack_is_the_packages(kw, robust_net, test_images):
    from pyautoattack import AutoAttack as Published
    net, (x, y) = copy.deepcopy(robust_net).cuda(), (t[:100].cuda() for t in test_images)
    aa = Published(net, norm='Linf', eps=.1, seed=0, version='standard', device='cuda')
    def is_robust(x_adv):
        with torch.no_grad(): return (net(x).argmax(1) == y) & (net(x_adv).argmax(1) == y)
    want, got = (is_robust(aa.run_standard_evaluation(x, y, batch_size=50)[0]),
                 is_robust(AutoAttack(.1, seed=0, bs=50, **kw)(net, x, y)))
    assert 0 < want.sum() < 100 and torch.equal(got, want)

# --- training ---

@pytest.mark.parametrize('name', methods)
def test_steps_are_those_of_the_cpu(name, make_learner, make_dls, tiny_net):
    def train(device):
        dls = make_dls(n=128, bs=32, shuffle=False, device=device)
        learn = make_learner(dls, tiny_net(), opt_func=SGD, cbs=methods[name](tiny_net(seed=7), still))
        learn.fit(1, .01)
        return [p.detach().cpu() for p in learn.model.parameters()]
    for p,q in zip(train('cuda'), train('cpu')): torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)

@pytest.mark.parametrize('kw', fast, ids=str)
def test_resume(kw, make_learner, make_dls, tiny_net, tmp_path):
    """Killed in the second epoch, it ends with the bits of a run that was not: weights, momentum, the GPU's
    random numbers"""
    class Die(Callback):
        order, only_shows = 2000, True # no part of the training
        def after_batch(self):
            if self.learn.train_iter == 6: raise KeyboardInterrupt
    def train(cbs=(), seed=0, net=0):
        set_seed(seed)
        learn = make_learner(make_dls(n=128, bs=32, device='cuda'), tiny_net(seed=net, dropout=.3),
                             cbs=AKDCallback(tiny_net(seed=7), attack=PGD(.1, steps=2), **kw))
        learn.fit_one_cycle(3, .01, cbs=cbs)
        return [t.cpu() for t in (*learn.model.state_dict().values(), torch.cuda.get_rng_state())]
    want = train()
    with pytest.raises(KeyboardInterrupt): train([Resume(tmp_path/'r.pth'), Die()])
    got = train([Resume(tmp_path/'r.pth')], seed=99, net=5)
    assert all(torch.equal(p, q) for p,q in zip(got, want))

# --- CUDA graphs ---

graph_attacks = [PGD(.1, steps=3), PGD(.5, steps=3, norm='L2'), PGD(.1, steps=2, restarts=2), PGD(.1, objective='cw'),
                 FFGSM(.1)]
@pytest.mark.parametrize('attack', graph_attacks, ids=repr)
def test_a_graph_makes_the_same_images(attack, tiny_net):
    "With the same random numbers, after steps of an optimiser; the random state is the same, too"
    ends = []
    for on in (False, True):
        torch.manual_seed(0); torch.cuda.manual_seed(0)
        net,out = tiny_net().cuda(),[]
        for _ in range(8):
            x,y = torch.rand(32, 1, 8, 8, device='cuda'),torch.randint(10, (32,), device='cuda')
            with faster(cuda_graph=on): out.append(attack(net, x, y))
            with torch.no_grad(): net[0].weight.mul_(1.05)
        ends.append((out, torch.cuda.get_rng_state()))
    for a,b in zip(ends[0][0], ends[1][0]): assert ((a - b).abs() < 1e-4).float().mean() > .995
    assert torch.equal(ends[0][1], ends[1][1])
    used = [e for g in graphs._graphs.values() for e in g.entries if e.graph is not None]
    assert used and all(g.works for g in graphs._graphs.values())
    graphs.release_graphs()

class Reads(nn.Module):
    "A network that reads a value, which cannot be recorded"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x) if x.sum().item() > -1e9 else self.net(-x)

def test_what_cannot_be_recorded_runs_as_usual(tiny_net):
    "Once a warning, and the GPU works on, with the same random numbers"
    ends = []
    for on in (False, True):
        torch.manual_seed(0); torch.cuda.manual_seed(0)
        net = Reads(tiny_net()).cuda()
        with warnings.catch_warnings(record=True) as ws, faster(cuda_graph=on):
            warnings.simplefilter('always')
            out = [PGD(.1, steps=2)(net, torch.rand(8, 1, 8, 8, device='cuda'), torch.arange(8, device='cuda'))
                   for _ in range(6)]
        assert sum('`cuda_graph=True` is not used' in str(w.message) for w in ws) == on
        ends.append((out, torch.cuda.get_rng_state()))
    assert all(torch.equal(a, b) for a,b in zip(ends[0][0], ends[1][0])) and torch.equal(ends[0][1], ends[1][1])

@pytest.mark.parametrize('name', methods)
@pytest.mark.parametrize('kw', [{}, dict(cuda_graph=True)], ids=str)
def test_no_step_waits_for_the_gpu(name, kw, make_learner, make_dls, tiny_net, monkeypatch):
    "From the fifth batch on: PyTorch raises an error where a method would wait; a check waits for its own copy alone"
    call = RobustCallback.__call__
    def guarded(cb, event):
        events = 'before_batch','after_pred','after_loss','before_step'
        if event not in events or not cb.training or cb.learn.train_iter < 4: return call(cb, event)
        torch.cuda.set_sync_debug_mode('error')
        try: return call(cb, event)
        finally: torch.cuda.set_sync_debug_mode('default')
    monkeypatch.setattr(RobustCallback, '__call__', guarded)
    cb = methods[name](tiny_net(seed=7), PGD(.1, steps=2))
    cb.cuda_graph = kw.get('cuda_graph', False)
    make_learner(make_dls(n=256, bs=32, device='cuda', device_resident=True), tiny_net(), cbs=cb).fit(2)

class Wide(nn.Module):
    "A network whose activations a leak could not hide"
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
                                 nn.Linear(1024, 10))
    def forward(self, x): return self.net(x)

class Watch(Callback):
    "GPU memory after every hundredth step"
    order, run_valid = 2000, False
    def before_fit(self): self.seen,self.n = [],0
    def after_batch(self):
        self.n += 1
        if self.n % 100 == 0: gc.collect(); self.seen.append(torch.cuda.memory_allocated())

@pytest.mark.parametrize('name, kw', [('at', {}), ('trades', {}), ('akd', {}), ('rslad', {}), ('ckd', {}),
                                      ('akd', dict(compile=True, bf16=True)), ('akd', dict(cuda_graph=True)),
                                      ('akd', dict(compile=True, bf16=True, cuda_graph=True))], ids=str)
def test_two_thousand_steps(name, kw, make_learner, make_dls):
    "The memory after step 2,000 is that after step 300, when what waits for the garbage collector is gone"
    dls, teacher = make_dls(n=1280, n_valid=64, bs=64, channels=3, device_resident=True, device='cuda'), Wide().cuda()
    cb = methods[name](teacher, still) if not kw else AKDCallback(teacher, attack=still, **kw)
    learn = make_learner(dls, Wide(), cbs=[cb, NonFinite()])
    learn.recorder.after_batch = lambda: None # it keeps each loss, on the GPU
    learn.fit(2000//len(dls.train) + 1, 1e-3, cbs=(watch := Watch()))
    assert len(watch.seen) >= 20 and watch.seen[-1] - watch.seen[2] <= 2**16, watch.seen

# --- the whole way ---

def test_the_command_line(tmp_path, capsys):
    common = ['--data', 'digits', '--width', '1/16', '--n', '1200', '--epochs', '6']
    main(['train', *common, '--out', str(tmp_path/'teacher')])
    main(['distill', *common, '--teacher', str(tmp_path/'teacher'), '--out', str(tmp_path/'student')])
    main(['evaluate', str(tmp_path/'student'), '--attacks', 'clean,pgd20,autoattack', '--n', '64', '--fast', '--json',
          str(tmp_path/'card.json')])
    found = {k: v['accuracy'] for k,v in json.loads((tmp_path/'card.json').read_text())['results'].items()}
    assert found['clean'] > .3 and found['clean'] >= found['pgd20'] >= found['autoattack'] - .02

def test_images_go_where_the_network_is(robust_net, test_images):
    "`robust_accuracy` and `check_masking` take images of the CPU"
    net, (x, y) = copy.deepcopy(robust_net).cuda(), test_images
    assert robust_accuracy(net, x, y, still) == robust_accuracy(net, x.cuda(), y.cuda(), still) > .5
    assert len(check_masking(net, x[:100], y[:100], eps=.1).symptoms) > 3
