"""Attack and teacher as a CUDA graph, tested without a GPU: the graph has its memory for images and results, and the
launches that it would replay are made anew. `tests/test_gpu.py` tests the graphs themselves."""
import copy, gc, json, subprocess, sys, threading, weakref
from pathlib import Path

import pytest, torch, torch.nn as nn
from fastai.vision.all import Callback, set_seed

from rkd_fastai import graphs
from rkd_fastai.all import (AdaADCallback, AKDCallback, FFGSM, FGSM, PGD, PixelModel, Resume,
                            RSLADCallback, Teacher)
from rkd_fastai.attacks.autoattack import AutoAttack
from rkd_fastai.progress import counting
from rkd_fastai.speed import faster

class Recorded(graphs._Graph):
    "Record the function instead of its launches"
    made = replayed = 0
    def _record(self, fn, inputs):
        self.inputs = [t.clone() for t in inputs]
        self.out = fn(*self.inputs).clone()
        Recorded.made += 1
    def replay(self, fn):
        Recorded.replayed += 1
        self.out.copy_(fn(*self.inputs))

@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(graphs, '_Graph', Recorded)
    monkeypatch.setattr(graphs, '_can_capture', lambda device: True)
    monkeypatch.setattr(Recorded, 'made', 0); monkeypatch.setattr(Recorded, 'replayed', 0)
    yield Recorded
    graphs.release_graphs()

def batches(n, bs=16): return [(torch.rand(bs, 1, 8, 8), torch.randint(0, 10, (bs,))) for _ in range(n)]

@pytest.mark.parametrize('attack', [PGD(.1, steps=3), PGD(.5, steps=3, norm='L2'), PGD(.1, steps=2, restarts=2),
                                    PGD(.1, steps=2, objective='cw'), PGD(.1, steps=2, random_start=.01),
                                    PGD(.1, steps=2, objective='kl'), FGSM(.1), FFGSM(.1)], ids=repr)
def test_the_same_bits(attack, tiny_net, recorded):
    "With and without a graph, for every objective; the random state is the same, too"
    net,ends = tiny_net(),[]
    data = batches(6)
    if attack.objective == 'kl': data = [(x, torch.rand(len(x), 10).softmax(1)) for x,_ in data]
    for on in (False, True):
        torch.manual_seed(3)
        with faster(cuda_graph=on): ends.append(([attack(net, x, y) for x,y in data], torch.get_rng_state()))
    assert all(torch.equal(a, b) for a,b in zip(ends[0][0], ends[1][0], strict=True)) and recorded.replayed == 5
    assert torch.equal(ends[0][1], ends[1][1])

def test_a_step_of_the_optimiser_is_seen(tiny_net, recorded):
    net = tiny_net()
    opt = torch.optim.SGD(net.parameters(), .5, momentum=.9)
    for i,(x,y) in enumerate(batches(6)):
        with faster(cuda_graph=True): got = PGD(.1, random_start=False)(net, x, y)
        assert torch.equal(got, PGD(.1, random_start=False)(copy.deepcopy(net), x, y))
        nn.functional.cross_entropy(net(got), y).backward(); opt.step()
    net.load_state_dict(tiny_net(seed=5).state_dict())
    with faster(cuda_graph=True): got = PGD(.1, random_start=False)(net, x, y)
    assert recorded.made == 1 and torch.equal(got, PGD(.1, random_start=False)(tiny_net(seed=5), x, y))

class Changes:
    "What makes a graph invalid: each returns the next attack, network and images"
    def attribute(attack, net, x): net[1].eps = 1e-2
    def own_attribute(attack, net, x): net[2].factor = 2
    def hook(attack, net, x): net[0].register_forward_hook(lambda m, i, o: o*1.5)
    def layer(attack, net, x): net[2] = nn.SiLU()
    def weight(attack, net, x): net[0].weight = nn.Parameter(net[0].weight.detach()*2)
    def data(attack, net, x): net[0].weight.data = net[0].weight.data*2
    def buffer(attack, net, x): net[1].running_mean = net[1].running_mean + 1
    def statistics(attack, net, x): net[1].track_running_stats,net[1].running_mean,net[1].running_var = False,None,None
    def dtype(attack, net, x): net.double(); return x.double()
    def channels_last(attack, net, x): net[0].weight.data = torch.rand(8, 3, 3, 1).permute(0, 3, 1, 2)
    def eps(attack, net, x): attack.eps = .2
    def steps(attack, net, x): attack.steps = 1
    def step_size(attack, net, x): attack.step_size = .01
    def objective(attack, net, x): attack.objective = 'cw'
    def batch_size(attack, net, x): return x[:8]
    def cudnn(attack, net, x): torch.backends.cudnn.benchmark = True
    def autocast(attack, net, x): torch.set_autocast_enabled('cpu', True)

changes = [f for k,f in vars(Changes).items() if not k.startswith('_')]
@pytest.mark.parametrize('change', changes, ids=lambda f: f.__name__)
def test_what_makes_a_graph_invalid(change, tiny_net, recorded, request):
    request.addfinalizer(lambda: (torch.set_autocast_enabled('cpu', False),
                                  setattr(torch.backends.cudnn, 'benchmark', False)))
    net,attack = tiny_net(),PGD(.1, steps=2, random_start=False)
    (x,y), = batches(1)
    with faster(cuda_graph=True):
        for _ in range(4): attack(net, x, y)
        assert (recorded.made, recorded.replayed) == (1, 3)
        changed = change(attack, net, x)
        x = x if changed is None else changed
        got = [attack(net, x, y[:len(x)]) for _ in range(2)]
        assert (recorded.made, recorded.replayed) == (1, 3)
        got.append(attack(net, x, y[:len(x)]))
        assert recorded.made == 2
    want = attack(copy.deepcopy(net), x, y[:len(x)])
    assert all(torch.allclose(g, want, atol=1e-6) for g in got)

def test_what_does_not(tiny_net, recorded):
    "Mode, gradients and what is frozen are the network's own; the attack runs on its twin"
    net,attack = tiny_net(),PGD(.1, steps=2)
    with faster(cuda_graph=True):
        for i,(x,y) in enumerate(batches(8)):
            net.train(i%2 == 0).requires_grad_(i%3 == 0)
            attack(net, x, y)
    assert (recorded.made, recorded.replayed) == (1, 7)

def test_not_by_itself(tiny_net, recorded):
    "Without `cuda_graph`, for a function as target, while passes are counted and for APGD nothing is recorded"
    net = tiny_net()
    for x,y in batches(4):
        PGD(.1)(net, x, y)
        with faster(compile=False, bf16=False): PGD(.1)(net, x, y)
        with faster(cuda_graph=True):
            PGD(.1, steps=1, objective='kl')(net, x, lambda x: torch.full((len(x), 10), .1))
            AutoAttack(.1, bs=16, fast=False)(net, x, y)
            with counting(lambda *args: None): PGD(.1)(net, x, y)
    assert recorded.made == 0

@pytest.mark.parametrize('fails', ['capture','result','random'])
def test_a_graph_that_cannot_be_trusted(fails, tiny_net, monkeypatch, recorded):
    "One warning, the right result, the right random state, and no further trial"
    class Wrong(Recorded):
        def _record(self, fn, inputs):
            super()._record(fn, inputs)
            if fails == 'capture': raise RuntimeError('operation not permitted when stream is capturing\nmore')
        def replay(self, fn):
            super().replay(fn)
            if fails == 'result': self.out.add_(.05)
            if fails == 'random': torch.rand(1)
    monkeypatch.setattr(graphs, '_Graph', Wrong)
    net,data,ends = tiny_net(),batches(6),[]
    says = 'RuntimeError: operation not permitted when stream is capturing' if fails == 'capture' else 'differs'
    for on in (False, True):
        torch.manual_seed(3)
        if on:
            with faster(cuda_graph=True), pytest.warns(UserWarning) as ws:
                out = [PGD(.1)(net, x, y) for x,y in data]
            assert [str(w.message) for w in ws] and len(ws) == 1 and says in str(ws[0].message)
        else: out = [PGD(.1)(net, x, y) for x,y in data]
        ends.append((out, torch.get_rng_state()))
    assert all(torch.equal(a, b) for a,b in zip(ends[0][0], ends[1][0])) and torch.equal(ends[0][1], ends[1][1])
    assert recorded.made == 1

def test_it_is_compared_again(tiny_net, recorded, monkeypatch):
    "An object of the network's own selects another path, which no attribute shows"
    class Way: factor = 1.
    class Hidden(nn.Module):
        def __init__(self): super().__init__(); self.net,self.way = tiny_net(),Way()
        def forward(self, x): return self.net(x)*self.way.factor
    monkeypatch.setattr(graphs._Graphs, 'check_every', 5)
    class Stale(Recorded): # as a CUDA graph: it goes the way that it went when it was recorded
        def replay(self, fn):
            now,net.way.factor = net.way.factor,1.
            super().replay(fn)
            net.way.factor = now
    monkeypatch.setattr(graphs, '_Graph', Stale)
    net,attack = Hidden(),PGD(.1, steps=2, random_start=False)
    with faster(cuda_graph=True):
        for x,y in batches(3): attack(net, x, y)
        net.way.factor = -1.
        with pytest.warns(UserWarning, match='its result differs'):
            for x,y in batches(2): got = attack(net, x, y)
        assert torch.equal(got, attack(copy.deepcopy(net), x, y))
        assert torch.equal(attack(net, x, y), got)

def test_the_teacher(tiny_net, recorded):
    teacher = Teacher([PixelModel(tiny_net(seed=1), .5, .2), tiny_net(seed=2)])
    with faster(cuda_graph=True): got = [teacher.probs(x) for x,_ in batches(6)] # the first call sets attributes
    assert recorded.made == 2 and recorded.replayed == 2*4
    torch.manual_seed(0)
    assert len({tuple(p.flatten().tolist()) for p in got}) == 6 # each result has memory of its own
    x = torch.rand(16, 1, 8, 8)
    with faster(cuda_graph=True): assert torch.equal(teacher.probs(x), copy.deepcopy(teacher).probs(x))

@pytest.mark.parametrize('method', [AKDCallback, RSLADCallback, AdaADCallback])
def test_the_same_training(method, make_learner, tiny_net, recorded, tmp_path):
    "Weights and random numbers, also if `Resume` continues it; the last smaller batch runs as usual"
    ends = []
    class Die(Callback):
        order,only_shows = 2000,True
        def after_batch(self):
            if self.training and self.train_iter == 4: raise KeyboardInterrupt
    def learner(on):
        set_seed(1)
        pgd = PGD(.1, steps=2, objective='kl') if method is AdaADCallback else PGD(.1, steps=2)
        return make_learner(cbs=method(tiny_net(seed=1), attack=pgd, cuda_graph=on))
    for on in (False, True):
        learn = learner(on)
        learn.fit(3)
        ends.append([*learn.model.state_dict().values(), torch.get_rng_state()])
    assert recorded.replayed > 3
    learn = learner(True)
    with pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=[Resume(tmp_path/'run.pth', every=1), Die()])
    learn = learner(True)
    learn.fit(3, cbs=Resume(tmp_path/'run.pth', every=1))
    ends.append([*learn.model.state_dict().values(), torch.get_rng_state()])
    for other in ends[1:]: assert all(torch.equal(a, b) for a,b in zip(ends[0], other, strict=True))

def test_two_threads(tiny_net, recorded):
    "The memory of a graph belongs to one call at a time"
    teacher,(x,_),inside,go = Teacher(tiny_net()),batches(1)[0],threading.Event(),threading.Event()
    replay = Recorded.replay
    def slow(self, fn): inside.set(); go.wait(5); replay(self, fn)
    with faster(cuda_graph=True):
        for _ in range(4): want = teacher.probs(x)
        out = []
        def other():
            with faster(cuda_graph=True): out.append(teacher.probs(x))
        with pytest.MonkeyPatch.context() as m:
            m.setattr(Recorded, 'replay', slow)
            thread = threading.Thread(target=other); thread.start()
            assert inside.wait(5)
            got = teacher.probs(1-x) # not the other thread's images
            go.set(); thread.join()
    assert torch.equal(out[0], want) and torch.equal(got, copy.deepcopy(teacher).probs(1-x))

def test_memory_is_freed(tiny_net, recorded):
    net = tiny_net()
    with faster(cuda_graph=True):
        for x,y in batches(4): PGD(.1, steps=1)(net, x, y)
        for i in range(40): PGD(.1, steps=1 + i%8)(net, x, y)
    kept = [e for g in graphs._graphs.values() for e in g.entries]
    assert 0 < len(kept) <= graphs._Graphs.most
    root = weakref.ref(kept[0])
    del kept; graphs.release_graphs(); gc.collect()
    assert root() is None

def bench_on_gpu(tmp_path, *args):
    r = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'bench.on_gpu', '--small', '--out', tmp_path, *args],
                       capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert r.returncode == 0, r.stderr
    lines = (tmp_path/'summary.txt').read_text().splitlines()
    assert all(line.split()[1] == 'ok' for line in lines), '\n'.join(
        lines + [p.read_text()[-2000:] for p in tmp_path.glob('*.txt')])
    return [line.split()[0] for line in lines]

def test_the_script_for_a_gpu_runs(tmp_path):
    assert bench_on_gpu(tmp_path, '--only', 'memory') == ['memory']
    assert 'step 30: ' in (tmp_path/'memory.txt').read_text()

@pytest.mark.slow
def test_all_of_the_script_for_a_gpu_runs(tmp_path):
    "Each stage, with small shapes; each leaves its own file"
    stages = bench_on_gpu(tmp_path)
    assert stages == ['tests','variants','profile','step','attack','overhead','memory','autoattack']
    lines = (tmp_path/'variants.txt').read_text().splitlines()
    rows = [json.loads(l) for l in lines if l.startswith('{')]
    assert len(rows) == 7 and all(r['ms'] > 0 for r in rows)
    assert 'plain loop' in (tmp_path/'step.txt').read_text()
    assert 'CPU time total' in (tmp_path/'profile.txt').read_text()

def test_settings_that_are_no_numbers(tiny_net, recorded):
    "An attack with an array as a setting is not recorded, since another array would not be seen"
    class Masked(PGD):
        def perturb(self, model, x, targ): return x + self.mask*(super().perturb(model, x, targ) - x)
    net,attack = tiny_net(),Masked(.1, steps=1)
    attack.mask = torch.ones(8, 8)
    with faster(cuda_graph=True):
        for x,y in batches(5): attack(net, x, y)
    assert recorded.made == 0

def test_an_empty_graph(tiny_net, monkeypatch, recorded):
    "It would give the result of its recording for ever"
    class Empty(Recorded):
        def replay(self, fn): pass
    monkeypatch.setattr(graphs, '_Graph', Empty)
    teacher,data = Teacher(tiny_net()),batches(6)
    with faster(cuda_graph=True), pytest.warns(UserWarning, match='its result differs'):
        got = [teacher.probs(x) for x,_ in data]
    assert all(torch.equal(p, teacher.probs(x)) for p,(x,_) in zip(got, data))
