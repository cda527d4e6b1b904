"""What a stranger loads is the network: the same logits, the same gradients, the same broken images, without this
library."""
import copy, json, random, subprocess, sys, types, warnings, zipfile
import numpy as np, pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.vision.all import MixUp, create_vision_model
from pyautoattack import AutoAttack as Published
from rkd_fastai.all import *
from rkd_fastai.core import frozen, unwrap
from rkd_fastai.evaluation.robustness import measure_robustness
from rkd_fastai.normalization import pixel_model, sample_images
from rkd_fastai.evaluation import export

def gradient(net, x):
    "Input gradient of the cross-entropy with the likeliest class but one"
    with frozen(net):
        x = x.clone().requires_grad_()
        logits = net(x)
        return torch.autograd.grad(F.cross_entropy(logits, logits.topk(2).indices[:,1], reduction='sum'), x)[0]

def same(a, b, x, tol=1e-6):
    with torch.no_grad(), frozen(a), frozen(b): torch.testing.assert_close(a(x), b(x), rtol=tol, atol=tol)
    torch.testing.assert_close(gradient(a, x), gradient(b, x), rtol=tol, atol=tol)

def load(folder):
    "As `import load_model` in a process of its own, but each folder's own page"
    page = types.ModuleType('load_model'); page.__file__ = str(folder/'load_model.py')
    exec((folder/'load_model.py').read_text(), vars(page))
    return page.load_model

def info(folder): return json.loads((folder/'model_info.json').read_text())
def images(n, shape=(1, 8, 8), seed=0): return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))

stranger = '''
import importlib.util, pickle, sys, torch
torch.set_num_threads(1)
answers = {}
for name,(folder, shape) in torch.load('todo.pt').items():
    spec = importlib.util.spec_from_file_location('load_model', folder + '/load_model.py')
    page = importlib.util.module_from_spec(spec); spec.loader.exec_module(page)
    def forbidden(*args, **kwargs): raise RuntimeError('this would unpickle')
    kept = pickle.loads, pickle.load, torch.load
    pickle.loads = pickle.load = torch.load = forbidden
    model = page.load_model()
    pickle.loads, pickle.load, torch.load = kept
    model = model.eval()
    assert isinstance(model, torch.nn.Module) and not model.training
    for n in (1, 2, 7, 500):
        x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(n), requires_grad=True)
        logits = model(x)
        answers[name, n] = logits.detach(), torch.autograd.grad(logits.logsumexp(1).sum(), x)[0]
assert not {m.split('.')[0] for m in sys.modules} & {'fastai', 'fastcore', 'rkd_fastai', 'torchvision', 'pyautoattack'}
torch.save(answers, 'answers.pt')
'''

def test_a_stranger_without_this_library(tmp_path, make_learner, make_dls, tiny_net):
    "Loads, unpickles nothing, has nothing of ours, and gets the same answers for batches of any size"
    stats = [.3, .5, .6], [.2, .25, .3]
    grey, rgb = make_learner(), make_learner(make_dls(channels=3, stats=stats), cifar_resnet18(10, width=1/16))
    for learn in (grey, rgb): learn.fit(1, 1e-2)
    nets = dict(grey=(pixel_model(grey), (1, 8, 8)), rgb=(pixel_model(rgb), (3, 8, 8)),
                ensemble=(Teacher([grey, tiny_net(seed=5)], [.3, .7]), (1, 8, 8)))
    grey.to_robustbench(tmp_path/'grey'); rgb.to_robustbench(tmp_path/'rgb')
    export_robustbench(nets['ensemble'][0], images(4), tmp_path/'ensemble')
    torch.save({k: (str(tmp_path/k), shape) for k,(_,shape) in nets.items()}, tmp_path/'todo.pt')
    out = subprocess.run([sys.executable, '-W', 'error', '-c', stranger], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout == out.stderr == '', out.stderr
    answers = torch.load(tmp_path/'answers.pt')
    assert len(answers) == 12
    for (name, n),(logits, grad) in answers.items():
        net, shape = nets[name]
        x = images(n, shape, n).requires_grad_()
        with frozen(net):
            want = net(x)
            torch.testing.assert_close(logits, want.detach(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(grad, torch.autograd.grad(want.logsumexp(1).sum(), x)[0], rtol=1e-6, atol=1e-6)

class Behind(nn.Module):
    "A network behind a function"
    def __init__(self, net, before=lambda x: x, after=lambda o: o):
        super().__init__()
        self.net,self.before,self.after = net,before,after
    def forward(self, x): return self.after(self.net(self.before(x)))

class MadeOnDevice(nn.Module):
    "Makes a tensor on the device of its images"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x + torch.linspace(0, .1, x.shape[-1], device=x.device))

def small(n_in=3, act=nn.ReLU(inplace=True), size=8):
    return nn.Sequential(nn.Conv2d(n_in, 8, 3, 2, 1), nn.BatchNorm2d(8), act, nn.Dropout(.5), nn.Flatten(),
                         nn.Linear(8*(size//2)**2, 10))
def weight_normed():
    net = small(); nn.utils.parametrizations.weight_norm(net[0])
    return net
def timm_vit():
    import timm
    return timm.create_model('vit_tiny_patch16_224', img_size=16, patch_size=8, depth=2, num_classes=10)
def torchvision_model(name): return __import__('torchvision').models.get_model(name, num_classes=10)
def with_exp(x):
    "A part of it without gradient"
    with torch.no_grad(): e = torch.exp(x).sqrt()
    return x + e
nets = dict( # name: (makes a network, shape of its images)
    cifar_resnet18=(lambda: cifar_resnet18(10, width=1/16), (3, 8, 8)),
    resnet18_grey=(lambda: cifar_resnet18(10, width=1/16, n_in=1), (1, 12, 8)),
    wide_resnet=(lambda: wide_resnet(10, 1, mean=[.4, .5, .6], std=.25), (3, 8, 8)),
    dropout_inplace=(small, (3, 8, 8)),
    inplace_on_images=(lambda: nn.Sequential(nn.ReLU(inplace=True), small()), (3, 8, 8)),
    weight_norm=(weight_normed, (3, 8, 8)),
    made_on_device=(lambda: MadeOnDevice(small()), (3, 8, 8)),
    partly_without_gradient=(lambda: Behind(small(), before=with_exp), (3, 8, 8)),
    normalised=(lambda: PixelModel(small(), [.4, .5, .6], [.2, .3, .4]), (3, 8, 8)),
    teacher=(lambda: Teacher(small(), mean=.5, std=.25), (3, 8, 8)),
    teachers=(lambda: Teacher([Teacher([small(), cifar_resnet18(10, width=1/16)]), small(), small()], [.25, .75, 0.]),
              (3, 8, 8)),
    teacher_inside=(lambda: nn.Sequential(nn.Identity(), Teacher([small(), small()])), (3, 8, 8)),
    timm=(timm_vit, (3, 16, 16)), torchvision=(lambda: torchvision_model('resnet18'), (3, 32, 32)),
    fastai=(lambda: create_vision_model(__import__('torchvision').models.resnet18, 10, pretrained=False), (3, 32, 32)))

@pytest.mark.few(5)
@pytest.mark.parametrize('name', nets)
def test_networks(name, tmp_path, snapshot):
    "Of many kinds, in train mode when they are given; they and the images are left as they were"
    make, shape = nets[name]
    net = make().train()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.uniform_(-.2, .2); m.running_var.uniform_(.5, 2)
    x = images(4, shape)
    before, x_before, rng = snapshot.take(net), x.clone(), torch.get_rng_state()
    loaded = load(export_robustbench(net, x, tmp_path/'net'))()
    assert (snapshot.same(before, snapshot.take(net)) and torch.equal(x, x_before)
            and torch.equal(rng, torch.get_rng_state()))
    for n in (1, 7, 33):
        xn = images(n, shape, n)
        kept = xn.clone()
        same(loaded, PixelModel(net), xn)
        assert torch.equal(xn, kept)
    assert not any(p.requires_grad for p in loaded.parameters())

def test_hooks_that_watch(tmp_path):
    "See no tensors without values, and stay on the network"
    net, seen = small(1), []
    net[0].register_forward_hook(lambda m, i, o: seen.append(o.mean().item()))
    net[0].register_full_backward_hook(lambda m, i, o: seen.append(o[0].mean().item()))
    loaded = load(export_robustbench(net, images(4), tmp_path/'net'))()
    assert all(type(o) is float for o in seen)
    n = len(seen)
    same(loaded, net, images(5))
    assert len(seen) > n and len(net[0]._forward_hooks) == len(net[0]._backward_hooks) == 1

# --- Learners ---

def ddp(learn):
    learn.model = nn.parallel.DistributedDataParallel(learn.model)
    return learn
def channels_last(learn):
    learn.model.to(memory_format=torch.channels_last)
    return learn
def half(learn):
    learn.model.half()
    return learn
def partly_frozen(learn):
    learn.model[0].requires_grad_(False)
    return learn
def in_training(learn):
    learn.to_adversarial(PGD(steps=1)).fit(1, .01)
    learn.model.train()
    return learn
changes = dict(plain=lambda learn: learn, ddp=ddp, channels_last=channels_last, half=half, partly_frozen=partly_frozen,
               in_training=in_training, fp16=lambda learn: learn.to_fp16())
each_stats = pytest.mark.parametrize('channels,stats', [(1, None), (1, ([.3], [.35])), (3, None),
                                                        (3, ([.3, .5, .6], [.2, .25, .3]))])

@pytest.fixture(scope='module')
def one_process():
    "A group of one process, which `DistributedDataParallel` needs"
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()

@pytest.mark.few(8)
@pytest.mark.parametrize('change', changes)
@each_stats
def test_learners(change, channels, stats, tmp_path, make_learner, make_dls, snapshot, one_process):
    "Whatever is wrapped around the network or was done to it; nothing of it changes"
    learn = changes[change](make_learner(make_dls(channels=channels, stats=stats)))
    model, cbs = learn.model, list(learn.cbs)
    strides = [p.stride() for p in model.parameters()]
    before, rngs = snapshot.take(model), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    loaded = load(learn.to_robustbench(tmp_path/'out'))()
    assert (learn.model is model and list(learn.cbs) == cbs and snapshot.same(before, snapshot.take(model))
            and strides == [p.stride() for p in model.parameters()])
    assert (torch.equal(rngs[0], torch.get_rng_state()) and rngs[1] == random.getstate()
            and (rngs[2] == np.random.get_state()[1]).all())
    net = copy.deepcopy(unwrap(model)).float()
    same(loaded, PixelModel(net, *(stats or (None, None))), images(20, (channels, 8, 8)), 1e-5)
    assert all(t.is_contiguous() and t.dtype != torch.float16 for t in loaded.state_dict().values())

def test_of_several_processes_one_writes(tmp_path, make_learner, monkeypatch):
    monkeypatch.setattr(export, 'rank_distrib', lambda: 1)
    assert make_learner().to_robustbench(tmp_path/'out') == tmp_path/'out' and not (tmp_path/'out').exists()

# --- as RobustBench and AutoAttack use it ---

def clean_accuracy(model, x, y, batch_size):
    "The calls of `robustbench.utils.clean_accuracy`"
    with torch.no_grad():
        return sum((model(xb).max(1)[1] == yb).float().sum().item()
                   for xb,yb in zip(x.split(batch_size), y.split(batch_size)))/len(x)

def benchmark(model, x, y, eps, norm, batch_size):
    "The calls of `robustbench.eval.benchmark`: accuracies and the images that AutoAttack finds"
    if model.training: warnings.warn('The given model is *not* in eval mode.')
    device = torch.device('cpu')
    model = model.to(device)
    clean = clean_accuracy(model, x, y, batch_size)
    attack = Published(model, norm=norm, eps=eps, version='standard', device=device, seed=0)
    attack.square.n_queries = 300 # of 5000
    x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
    return clean, clean_accuracy(model, x_adv, y, batch_size), x_adv

@pytest.mark.parametrize('norm,eps', [('Linf', .2), pytest.param('L2', 1., marks=pytest.mark.slow)])
def test_benchmark_gives_the_same(norm, eps, tmp_path, robust_net, test_images, caplog):
    "The same accuracies, the very same adversarial images, and no warning of AutoAttack's"
    with torch.no_grad(): right = robust_net(test_images[0]).argmax(1) == test_images[1]
    x, y = (t[right][:5] for t in test_images)
    loaded = load(export_robustbench(robust_net, x, tmp_path/'net'))().eval()
    (clean, robust, x_adv), want = (benchmark(m, x, y, eps, norm, 3) for m in (loaded, robust_net))
    assert clean == want[0] == 1 and robust == want[1] < 1 and torch.equal(x_adv, want[2]) and (x_adv != x).any()
    assert not [r for r in caplog.records if r.levelname in ('WARNING', 'ERROR')]

def test_robustness_and_masking_of_what_is_loaded(tmp_path, robust_net, test_images):
    x, y = (t[:60] for t in test_images)
    loaded = load(export_robustbench(robust_net, x[:8], tmp_path/'net'))()
    cards = [measure_robustness(m, x, y, ('clean','fgsm','pgd20','cw'), eps=.1) for m in (loaded, robust_net)]
    assert cards[0].results == cards[1].results and cards[0].pgd20 < cards[0].clean
    assert check_masking(loaded, x[:40], y[:40], .1).ok

def test_stays_in_eval_mode(tmp_path):
    model = load(export_robustbench(small(1), images(4), tmp_path/'net'))()
    x = images(4)
    out = model(x)
    for do in (lambda m: m.train(), lambda m: m.train(True), lambda m: m.eval(), lambda m: m.requires_grad_(True),
               lambda m: m.cpu(), lambda m: m.to('cpu'), copy.deepcopy):
        again = do(model)
        assert (isinstance(again, nn.Module) and not any(m.training for m in again.modules())
                and torch.equal(again(x), out))
    for to in (model.half, model.double, lambda: model.to(torch.bfloat16)):
        with pytest.raises(TypeError, match='stays in float32'): to()
    assert torch.equal(model(x), out)

def devices(program):
    "Every device in a program: of its weights, and as written in its graph"
    found = {t.device.type for o in (program.state_dict, program.constants) for t in o.values()}
    for node in program.graph.nodes:
        found |= {torch.device(a).type for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.device)
                  or isinstance(a, str) and a in ('cpu', 'meta')}
    return found

@pytest.mark.parametrize('net', [PixelModel(small(), .5, .25), MadeOnDevice(small())])
def test_moves_whole(net, tmp_path):
    "Weights, statistics and the devices in the graph: on the meta device, where nothing is left of the CPU"
    load_model = load(export_robustbench(net, images(4, (3, 8, 8)), tmp_path/'net'))
    assert devices(load_model().program) == {'cpu'}
    for model in (load_model('meta'), load_model().to(torch.device('meta'))):
        assert (devices(model.program) == {'meta'}
                and all(t.is_meta for ts in (model.parameters(), model.buffers()) for t in ts))
        out = model(images(5, (3, 8, 8)).to('meta'))
        assert out.is_meta and out.shape == (5, 10)

@pytest.mark.cuda
def test_on_a_gpu(tmp_path):
    net = PixelModel(MadeOnDevice(small()), .5, .25).eval()
    folder, x = export_robustbench(net, images(4, (3, 8, 8)), tmp_path/'net'), images(9, (3, 8, 8))
    for model in (load(folder)('cuda'), load(folder)().cuda()):
        torch.testing.assert_close(model(x.cuda()).cpu(), net(x), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(gradient(model, x.cuda()).cpu(), gradient(net, x), rtol=1e-2, atol=1e-2)
        same(model.cpu(), net, x)
    same(load(export_robustbench(net.cuda(), images(4, (3, 8, 8)).cuda(), tmp_path/'from_gpu'))(), net.cpu(), x)

# --- the card ---

def card_of(n, results=('clean', 'autoattack'), eps=8/255, norm='Linf'):
    flags = {k: torch.arange(n) < round(n*(.91237 if k == 'clean' else .5)) for k in results}
    return Robustness(flags, {k: [k] for k in results}, {k: 1. for k in results}, eps, norm, 0)

@pytest.mark.parametrize('dataset,n_test,n,results,clean,autoattack', [
    ('cifar10', None, 10_000, ('clean','autoattack'), '91.24', '50.00'),
    ('cifar10', None, 1000, ('clean','autoattack'), None, None),
    ('cifar10', 1000, 1000, ('clean','autoattack'), None, None), ('cifar100', None, 10_000, ('clean',), '91.24', None),
    ('imagenet', None, 5000, ('clean','autoattack'), '91.24', '50.00'),
    ('imagenet', 50_000, 50_000, ('clean','autoattack'), None, None),
    ('digits', 360, 360, ('clean','autoattack'), '91.11', '50.00'),
    ('digits', 360, 359, ('clean','autoattack'), None, None),
    ('digits', None, 360, ('clean','autoattack'), None, None), (None, 360, 360, ('autoattack',), None, '50.00'),
    ('digits', 360, 360, ('clean','pgd20','pgd50x10','cw','apgd','square'), '91.11', None)])
def test_only_what_was_measured_is_on_the_card(dataset, n_test, n, results, clean, autoattack, tmp_path):
    "On all images, and with AutoAttack and nothing less"
    r = card_of(n, results)
    folder = export_robustbench(small(1), images(4), tmp_path/'net', r, n_test=n_test, dataset=dataset)
    card = info(folder)
    assert ((card['clean_acc'], card['autoattack_acc'], card['dataset'], card['eps'])
            == (clean, autoattack, dataset, '8/255'))
    assert json.loads((folder/'robustness.json').read_text()) == json.loads(json.dumps(r.to_dict()))

robustbench_fields = ('''link name authors additional_data number_forward_passes dataset venue architecture eps
                         clean_acc reported autoattack_acc footnote'''.split())

def test_card_as_robustbench_writes_it(tmp_path):
    "Its fields in its order, null where nothing is known, and what is given is unchanged"
    bare = export_robustbench(small(1), images(4), tmp_path/'bare')
    assert (list(info(bare)) == robustbench_fields
            and {k: v for k,v in info(bare).items() if v is not None} == dict(number_forward_passes=1))
    assert sorted(p.name for p in bare.iterdir()) == ['load_model.py', 'model.pt2', 'model_info.json']
    fields = dict(link='https://example.org', name='A "title"', authors='Zoë, Łukasz', additional_data=False,
                  number_forward_passes=3, dataset='cifar10', venue='ICML 2020', architecture='ResNet-18',
                  reported='58', footnote='α')
    full = export_robustbench(small(1), images(4), tmp_path/'full', card_of(10_000, eps=.5, norm='L2'), 'L2', **fields)
    assert (info(full) == fields | dict(eps='0.5', clean_acc='91.24', autoattack_acc='50.00')
            and list(info(full)) == robustbench_fields)

@pytest.mark.parametrize('betas,n', [(None, 2), ([.5, .5], 2), ([1., 0.], 1)])
def test_forward_passes_of_an_ensemble(betas, n, tmp_path):
    teacher = Teacher([small(1), small(1)], betas)
    assert info(export_robustbench(teacher, images(4), tmp_path/'a'))['number_forward_passes'] == n
    assert info(export_robustbench(Teacher([teacher, small(1)]), images(4),
                                   tmp_path/'b'))['number_forward_passes'] == n + 1

def test_card_of_a_learner(tmp_path, make_learner, make_dls):
    "All images are those of the test split where there is one; its classes are written"
    for dls in (make_dls(n_valid=48), make_dls(n_valid=24, n_test=48)):
        learn = make_learner(dls)
        r = learn.robustness(('clean',), eps=.1)
        full, part = (learn.to_robustbench(tmp_path/f'{len(dls.loaders)}_{n}',
                                           learn.robustness(('clean',), eps=.1, n=n), dataset='digits')
                      for n in (None, 24))
        assert (r.n == 48 and info(full)['clean_acc'] == f'{100*r.clean:.2f}' and info(full)['eps'] == '0.1'
                and info(part)['clean_acc'] is None)
        assert json.loads((full/'classes.json').read_text()) == [str(i) for i in range(10)]

def test_file_tells_nothing_of_images_and_machine(tmp_path, make_learner):
    "Neither the images it was tried on nor the folders of whoever wrote it"
    learn = make_learner()
    x = sample_images(learn.dls, 8)
    folder = learn.to_robustbench(tmp_path/'net')
    nested = export_robustbench(Behind(small(1), before=with_exp), x, tmp_path/'nested')
    for f in (folder, nested):
        with zipfile.ZipFile(f/'model.pt2') as z: parts = [z.read(n) for n in z.namelist()]
        for p in parts:
            assert (b'stack_trace' not in p and b'site-packages' not in p and str(tmp_path).encode() not in p
                    and b'export.py' not in p and x[:1].numpy().tobytes() not in p)
    page = (folder/'load_model.py').read_text()
    assert ('images in [0, 1] (n, 1, 8, 8) -> logits (n, 10)' in page and torch.__version__ in page
            and str(tmp_path) not in page)

# --- what is refused, with nothing left behind ---

class Straight(torch.autograd.Function):
    "Rounds, and hands the gradient through"
    @staticmethod
    def forward(ctx, x): return (x*10).round()/10
    @staticmethod
    def backward(ctx, g): return g
class Counts(nn.Module):
    "Answers differently each time"
    def __init__(self): super().__init__(); self.net, self.n = small(1), 0
    def forward(self, x): self.n += 1; return self.net(x)*self.n
def pruned():
    from torch.nn.utils import prune
    net = small(1); prune.random_unstructured(net[0], 'weight', .5)
    return net
def hooked():
    net = small(1); net[0].register_forward_hook(lambda m, i, o: o*2)
    return net
def broken():
    net = small(1); nn.init.constant_(net[0].weight, float('nan'))
    return net
refused = dict( # name: (makes a network, error, message)
    probabilities=(lambda: nn.Sequential(small(1), nn.Softmax(1)), ValueError,
                   'returns probabilities.*remove the softmax'),
    a_tuple=(lambda: Behind(small(1), after=lambda o: (o, o)), TypeError, '`model` must return logits .* got tuple'),
    feature_maps=(lambda: nn.Conv2d(1, 10, 1), TypeError, '`model` must return logits .* shape'),
    nan=(broken, ValueError, 'returned NaN or infinite logits'),
    other_images=(lambda: small(3), ValueError,
                  r'`model` cannot run on images of shape \(1, 8, 8\).*Use images of the size'),
    depends_on_values=(lambda: Behind(small(1), before=lambda x: x*2 if x.mean() > .4 else x), ValueError,
                       '`model` cannot be exported: its forward pass must consist of'),
    by_numpy=(lambda: Behind(small(1), before=lambda x: x + torch.tensor(x.detach().numpy())), ValueError,
              '`model` cannot be exported: its forward pass must consist of'),
    one_batch_size=(lambda: Behind(small(1), after=lambda o: torch.stack([r for r in o])), ValueError,
                    '`model` cannot be exported: its forward pass must consist of'),
    random=(lambda: Behind(small(1), before=lambda x: x + .1*torch.randn_like(x)), ValueError,
            'its logits were different after loading. It must not be random'),
    counts=(Counts, ValueError, 'its logits were different after loading.* change with each call'),
    hooked=(hooked, ValueError, 'its logits were different after loading.* changed by hooks'),
    straight_through=(lambda: Behind(small(1), before=Straight.apply), ValueError,
                      'its gradients were different.*its own gradients'),
    detached=(lambda: Behind(small(1).requires_grad_(False), before=lambda x: x.detach()), ValueError,
              'has no gradients with respect to its images'),
    pruned=(pruned, ValueError, '`model` cannot be copied .*pruning'))

@pytest.mark.parametrize('name', refused)
def test_networks_that_are_refused(name, tmp_path, snapshot):
    make, error, match = refused[name]
    net = make()
    before, rng = snapshot.take(net), torch.get_rng_state()
    with pytest.raises(error, match=match) as e: export_robustbench(net, images(4), tmp_path/'new'/'net')
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())
    assert (torch.equal(rng, torch.get_rng_state())
            and all(torch.equal(v.nan_to_num(), before[0][k].nan_to_num()) for k,v in net.state_dict().items()))

@pytest.mark.parametrize('kwargs,error,match', [
    (dict(model='net.pth'), TypeError, '`model` must be an nn.Module .*got str'),
    (dict(x=torch.rand(2, 1, 8, 8)*255), ValueError, '`x` must be images in'),
    (dict(x=torch.rand(0, 1, 8, 8)), ValueError, '`x` contains no images'),
    (dict(x=torch.rand(1, 8, 8)), ValueError, '`x` must be a batch'),
    (dict(norm='L1'), ValueError, "`norm` must be 'Linf' or 'L2'"),
    (dict(robustness=.5), ValueError, '`robustness` must be what'),
    (dict(robustness=card_of(10, norm='L2')), ValueError,
     "`robustness` was measured in L2, but `norm` is 'Linf': pass `norm='L2'`"),
    (dict(robustness=card_of(10), norm='L2'), ValueError, "`robustness` was measured in Linf, but `norm` is 'L2'"),
    (dict(title='x'), ValueError, '`title` is not an entry'),
    (dict(autoattack_acc='99'), ValueError, '`autoattack_acc` is not an entry'),
    (dict(additional_data='no'), ValueError, "`additional_data` must be bool, got 'no'"),
    (dict(number_forward_passes=True), ValueError, '`number_forward_passes` must be int'),
    (dict(reported=58), ValueError, '`reported` must be str')])
def test_arguments_that_are_refused(kwargs, error, match, tmp_path):
    with pytest.raises(error, match=match):
        export_robustbench(**dict(model=small(1), x=images(4), folder=tmp_path/'new'/'net') | kwargs)
    assert not list(tmp_path.iterdir())

def contents(folder): return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob('*')}

@pytest.mark.parametrize('at,match', [('file', '`folder` .*is a file'), ('file/deep/er', '`folder` .*file is a file'),
                                      ('export', 'already contains an export'), ('full', 'is not empty')])
def test_folders_in_use(at, match, tmp_path):
    (tmp_path/'file').write_text('x'); (tmp_path/'full').mkdir(); (tmp_path/'full'/'notes').write_text('x')
    export_robustbench(small(1), images(4), tmp_path/'export')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=match): export_robustbench(small(1), images(4), tmp_path/at)
    assert contents(tmp_path) == before

def test_folders_that_are_taken(tmp_path, monkeypatch):
    "New ones below new ones, empty ones, relative ones as text; readable as other new folders are"
    (tmp_path/'empty').mkdir()
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path/'a'/'b', tmp_path/'empty', 'relative'):
        got = export_robustbench(small(1), images(4), folder)
        assert (got == (tmp_path/folder).resolve() and (got/'model.pt2').exists()
                and got.stat().st_mode == (tmp_path/'a').stat().st_mode)
    assert {p.name for p in tmp_path.iterdir()} == {'a', 'empty', 'relative'}

@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
@pytest.mark.parametrize('step', ['_write', '_load', '_check_same', 'fsync', 'rename'])
def test_whole_or_not_at_all(step, error, tmp_path, monkeypatch):
    "Whatever fails while writing, nothing is left; the next attempt succeeds"
    def fail(*args): raise error('no space left')
    owner = export.os if step in ('fsync', 'rename') else export
    kept = getattr(owner, step)
    (tmp_path/'empty').mkdir()
    monkeypatch.setattr(owner, step, fail)
    for folder in ('new/net', 'net'):
        with pytest.raises(error): export_robustbench(small(1), images(4), tmp_path/folder)
        assert [p.name for p in tmp_path.iterdir()] == ['empty']
    monkeypatch.setattr(owner, step, kept)
    export_robustbench(small(1), images(4), tmp_path/'new/net')

def test_written_weights_are_read_again(tmp_path, monkeypatch):
    "A file that came out wrong is found out"
    write = export._write
    def wrong(folder, program, page, cards):
        with torch.no_grad(): next(iter(program.state_dict.values())).mul_(1.01)
        write(folder, program, page, cards)
    monkeypatch.setattr(export, '_write', wrong)
    with pytest.raises(ValueError, match='cannot be exported: its .* different after loading'):
        export_robustbench(small(1), images(4), tmp_path/'net')
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('factor,ok', [(1 + 1e-6, True), (1 + 1e-3, False), (float('nan'), False)])
def test_comparison(factor, ok):
    "Forgives rounding and nothing more"
    net = small(1).eval()
    if ok: return export._check_same(Behind(net, after=lambda o: o*factor), net, images(4))
    with pytest.raises(ValueError, match='its logits were different after loading'):
        export._check_same(Behind(net, after=lambda o: o*factor), net, images(4))

def test_a_later_network_does_not_change_the_export(tmp_path, make_learner):
    "What was written shares nothing with the Learner, which trains on"
    learn = make_learner()
    folder, x = learn.to_robustbench(tmp_path/'net'), images(6)
    with torch.no_grad(): before = load(folder)()(x)
    learn.fit(1, .1)
    assert torch.equal(load(folder)()(x), before)
    with torch.no_grad(), frozen(learn.model): assert (pixel_model(learn)(x) - before).abs().max() > 1e-3

def test_float64_is_the_default_dtype(make_learner, tmp_path):
    "The network is exported, measured and trained as it is otherwise"
    learn = make_learner()
    try:
        torch.set_default_dtype(torch.float64)
        folder = learn.to_robustbench(tmp_path/'export', learn.robustness('pgd2', .1))
        net, x = export._load(folder), torch.rand(4, 1, 8, 8, dtype=torch.float32)
        with torch.no_grad(): torch.testing.assert_close(net(x), learn.model.eval()(x))
        learn.to_rkd(copy.deepcopy(learn.model), 'rslad', attack=PGD(steps=1)).fit(1, cbs=MixUp())
    finally: torch.set_default_dtype(torch.float32)
    assert len(learn.recorder.values) == 1
