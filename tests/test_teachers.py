"Teachers of every kind and from every kind of file, the hostile ones included."
import os, pickle, warnings
from argparse import Namespace
from collections import OrderedDict
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np, pytest, timm, torch, torch.nn as nn, torchvision
from fastai.vision.all import SGD, Image, Normalize, TensorImage, imagenet_stats, load_learner
from safetensors.torch import save_file

import rkd_fastai.learner # noqa: F401 (patches `fit_exp` and `fit_rkd` on `Learner`)
from rkd_fastai.attacks.pgd import PGD
from rkd_fastai.data.arrays import arrays_dls
from rkd_fastai.evaluation.robustness import robust_accuracy
from rkd_fastai.models import cifar_resnet18, wide_resnet
from rkd_fastai.checkpoint import *
from rkd_fastai.teachers import *

def probs_of(net, x): return net.eval()(x).softmax(1).detach()
def close(a, b, **kw): torch.testing.assert_close(a, b, **kw)
@pytest.fixture
def x(): return torch.rand(6, 1, 8, 8)


# --- what a teacher says ---

def test_learner_with_its_own_normalisation(x, make_learner, make_dls, tiny_net):
    t = Teacher(make_learner(make_dls(stats=([.3], [.25])), tiny_net()))
    close(t.probs(x), probs_of(tiny_net(), (x-.3)/.25)); close(t(x).softmax(1), t.probs(x))

def test_learner_without_normalisation(x, make_learner, tiny_net):
    close(Teacher(make_learner(model=tiny_net())).probs(x), probs_of(tiny_net(), x))

def test_module_with_and_without_mean_and_std(x, tiny_net):
    close(Teacher(tiny_net()).probs(x), probs_of(tiny_net(), x))
    close(Teacher(tiny_net(), mean=[.4], std=[.2]).probs(x), probs_of(tiny_net(), (x-.4)/.2))
    close(Teacher(tiny_net(), mean=.4, std=.2).probs(x), probs_of(tiny_net(), (x-.4)/.2))
    rgb, m, s = torch.rand(6, 3, 8, 8), [.1, .2, .3], [.5, .6, .7]
    want = probs_of(tiny_net(n_in=3), (rgb - torch.tensor(m).view(3,1,1))/torch.tensor(s).view(3,1,1))
    close(Teacher(tiny_net(n_in=3), mean=m, std=s).probs(rgb), want)

def test_ensembles_average_probabilities(x, make_learner, make_dls, tiny_net):
    a, b = probs_of(tiny_net(seed=1), (x-.3)/.25), probs_of(tiny_net(seed=2), (x-.4)/.2)
    learn = make_learner(make_dls(stats=([.3], [.25])), tiny_net(seed=1))
    # `mean`, `std` are the module's, not the Learner's
    close(Teacher([learn, tiny_net(seed=2)], mean=[.4], std=[.2]).probs(x), (a+b)/2)
    t = Teacher([learn, Teacher(tiny_net(seed=2), mean=.4, std=.2)], betas=[.8, .2])
    close(t.probs(x), .8*a + .2*b)
    close(t(x), (.8*a + .2*b).log(), rtol=1e-4, atol=1e-5)

def test_nested_ensembles(x, tiny_net):
    p = [probs_of(tiny_net(seed=i), x) for i in range(4)]
    inner = Teacher([tiny_net(seed=0), tiny_net(seed=1)], betas=[.25, .75])
    outer = Teacher([inner, tiny_net(seed=2), Teacher(Teacher(tiny_net(seed=3)))], betas=[.5, .3, .2])
    want = .5*(.25*p[0] + .75*p[1]) + .3*p[2] + .2*p[3]
    close(outer.probs(x), want); close(outer(x).exp(), want)

def test_weight_0_leaves_a_member_out(x, tiny_net):
    t = Teacher([tiny_net(seed=0), tiny_net(seed=1)], betas=[1., 0.])
    close(t.probs(x), probs_of(tiny_net(seed=0), x)); close(t(x).exp(), t.probs(x))

def test_temperature_softens_each_member(x, tiny_net):
    logits = [tiny_net(seed=i).eval()(x).detach() for i in (0, 1)]
    t = Teacher([tiny_net(seed=0), Teacher(tiny_net(seed=1))], betas=[.7, .3])
    close(t.probs(x, T=4.), .7*(logits[0]/4).softmax(1) + .3*(logits[1]/4).softmax(1))
    close(t.probs(x, 1.), t.probs(x))

def test_probs_are_float32_distributions_of_a_plain_tensor(x, tiny_net):
    p = Teacher([tiny_net(), tiny_net(seed=1)]).probs(TensorImage(x))
    assert type(p) is torch.Tensor and p.dtype == torch.float32 and not p.requires_grad
    close(p.sum(1), torch.ones(6))

def test_ensemble_of_certain_teachers_has_finite_logits(x):
    "Where every member is certain of the same class, log probs of the others are very negative, not -inf or NaN"
    class Certain(nn.Module):
        def forward(self, x): return 1e4*torch.eye(10)[:len(x)] + 0*x.mean()
    t = Teacher([Certain(), Certain()])
    assert t(x).isfinite().all() and t.probs(x).isfinite().all()

def test_can_be_attacked(x, tiny_net):
    t, y = Teacher([tiny_net(), tiny_net(seed=1)], mean=.4, std=.2), torch.arange(6)
    ce = lambda x: nn.functional.nll_loss(t.probs(x).log(), y)
    assert ce(PGD(.2)(t, x, y)) > ce(x)


# --- frozen, and apart from what it was made of ---

def test_frozen(tiny_net, make_learner):
    t = Teacher([tiny_net(dropout=.5), make_learner(model=tiny_net()), Teacher(tiny_net())])
    for _ in range(2):
        assert not any(m.training for m in t.modules()) and not any(p.requires_grad for p in t.parameters())
        t.train(); nn.Sequential(t).train()

def test_source_is_left_alone(x, tiny_net, make_learner):
    net = tiny_net().train(); learn = make_learner(model=net)
    t, t2 = Teacher(net), Teacher(learn)
    assert net.training and all(p.requires_grad for p in net.parameters())
    before = t.probs(x)
    with torch.no_grad():
        for p in net.parameters(): p.add_(1)
    close(t.probs(x), before, rtol=0, atol=0); close(t2.probs(x), before, rtol=0, atol=0)
    t(x.requires_grad_()).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in net.parameters())

def test_normalisation_of_the_learner_at_that_time(x, make_learner, make_dls, tiny_net):
    """`vision_learner` adds a Normalize to DataLoaders that may be the teacher's too: the teacher keeps what it was
    trained with"""
    from fastai.vision.all import Normalize
    dls = make_dls(); t = Teacher(make_learner(dls, tiny_net()))
    dls.add_tfms([Normalize.from_stats([.5], [.5], cuda=False)], 'after_batch')
    close(t.probs(x), probs_of(tiny_net(), x))


# --- what bad input gets ---

def test_empty_list():
    for empty in ([], (), nn.ModuleList()):
        with pytest.raises(ValueError, match='teacher'): Teacher(empty)

@pytest.mark.parametrize('betas', [[.5], [.5, .6], [1.5, -.5], [.5, float('nan')], [.4, .3, .3], []])
def test_betas(betas, tiny_net):
    with pytest.raises(ValueError, match='betas'): Teacher([tiny_net(), tiny_net()], betas=betas)

@pytest.mark.parametrize('what', [None, 'model.pth', Path('model.pth'), [None], lambda x: x, nn.Linear])
def test_no_model(what):
    with pytest.raises(TypeError, match='teacher'): Teacher(what)

def test_mean_without_std_and_where_it_belongs_to_nobody(tiny_net, make_learner):
    with pytest.raises(ValueError, match='std'): Teacher(tiny_net(), mean=[.5])
    with pytest.raises(ValueError, match='std'): Teacher(tiny_net(), mean=[.5], std=[0.])
    with pytest.raises(ValueError, match='mean'): Teacher(make_learner(model=tiny_net()), mean=[.5], std=[.5])

def test_nan(x):
    class NaN(nn.Module):
        def forward(self, x): return x.flatten(1)[:,:10]*float('nan')
    with pytest.raises(ValueError, match='teacher.*NaN'): Teacher(NaN()).probs(x)

def test_no_logits(x, tiny_net):
    class Two(nn.Module):
        def forward(self, x): return x.flatten(1), x
    with pytest.raises(TypeError, match='teacher.*logits'): Teacher(Two()).probs(x)

def test_members_of_other_classes(x, tiny_net):
    with pytest.raises(ValueError): Teacher([tiny_net(), tiny_net(n_out=7)]).probs(x)

def test_T(x, tiny_net):
    for T in (0., -1., float('nan')):
        with pytest.raises(ValueError, match='`T`'): Teacher(tiny_net()).probs(x, T)


# --- files ---

@pytest.fixture
def net(tiny_net): return tiny_net(seed=5)
def check(path, net, tiny_net, x, **kw):
    close(load_teacher(path, tiny_net(), **kw).probs(x), probs_of(net, x), rtol=1e-5, atol=1e-7)

def save(state, path): save_file(state, path) if path.suffix == '.safetensors' else torch.save(state, path)

@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.', 'model.',
                                    'model.module.'])
@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.safetensors'])
def test_usual_prefixes(prefix, suffix, net, tiny_net, x, tmp_path):
    "DataParallel and `torch.compile` leave them, in the order in which they were applied"
    save({prefix+k: v for k,v in net.state_dict().items()}, tmp_path/f'a{suffix}')
    check(tmp_path/f'a{suffix}', net, tiny_net, x)

@pytest.mark.parametrize('key', ['state_dict', 'model_state_dict', 'model', 'net', 'ema'])
def test_usual_wrappings(key, net, tiny_net, x, tmp_path):
    torch.save({key: OrderedDict({'module.'+k: v for k,v in net.state_dict().items()}), 'epoch': 3, 'acc': .5},
               tmp_path/'a.pth')
    check(tmp_path/'a.pth', net, tiny_net, x)

def madrylab_checkpoint(net, mean=(.3,), std=(.2,)):
    "What MadryLab's `robustness` saves of a network: each weight twice, and twice the statistics of its images"
    weights = {f'module.{part}.{k}': v for part in ('model','attacker.model') for k,v in net.state_dict().items()}
    stats = {f'module.{part}.new_{k}': torch.tensor(v).view(-1, 1, 1) for part in ('normalizer','attacker.normalize')
             for k,v in (('mean', mean), ('std', std))}
    return OrderedDict(stats | weights)

@pytest.mark.parametrize('name', ['a.pt', 'a.pth.tar', 'a.pt.best', '7_a.pt.latest'])
@pytest.mark.parametrize('parts', [('model','attacker','normalizer'), ('model','normalizer'), ('attacker',)],
                         ids='+'.join)
def test_checkpoint_of_madrylab(name, parts, net, tiny_net, x, tmp_path):
    "With the settings of its training; its normalisation is taken over, and another one where it is told"
    state = {k: v for k,v in madrylab_checkpoint(net).items() if k.split('.')[1] in parts}
    settings = Namespace(lr=.1, out=Path('runs'), classes=['a', 'b'])
    torch.save(dict(model=state, optimizer=torch.optim.SGD(net.parameters(), .1, .9).state_dict(), schedule=None,
                    epoch=150, args=settings, nat_prec1=np.float64(87.)), tmp_path/name)
    t = load_teacher(tmp_path/name, tiny_net())
    close(t.probs(x), probs_of(net, (x-.3)/.2)); close(t.members[0].mean.flatten(), torch.tensor([.3]))
    close(load_teacher(tmp_path/name, tiny_net(), mean=.5, std=.25).probs(x), probs_of(net, (x-.5)/.25))
    with pytest.raises(ValueError, match='normalisation statistics, .*: use `load_teacher`'):
        fitting_state(tmp_path/name, tiny_net())

def test_prefixes_before_some_names(net, tiny_net, x, tmp_path):
    state = {f'module.{k}' if i % 2 else f'module.model.{k}' if i % 3 else k: v
             for i,(k,v) in enumerate(net.state_dict().items())}
    torch.save(dict(state, mu=torch.full((1, 1, 1, 1), .3), sigma=torch.full((1, 1, 1, 1), .2)), tmp_path/'a.pth')
    close(load_teacher(tmp_path/'a.pth', tiny_net()).probs(x), probs_of(net, (x-.3)/.2))

def test_two_networks_in_one_checkpoint(net, tiny_net, tmp_path):
    "Neither is chosen; nor is half a normaliser left out, or one of images that end at 255"
    other = {f'module.model.{k}': v for k,v in tiny_net(seed=6).state_dict().items()}
    torch.save(madrylab_checkpoint(net) | other, tmp_path/'a.pth')
    with pytest.raises(ValueError, match='a.pth` contains two different tensors for `0.weight`, '
                                         '`module.model.0.weight` and `module.attacker.model.0.weight`'):
        load_teacher(tmp_path/'a.pth', tiny_net())
    torch.save({k: v for k,v in madrylab_checkpoint(net).items() if not k.endswith('new_std')}, tmp_path/'b.pth')
    with pytest.raises(ValueError, match=r'does not fit `model` \(unexpected: 1 \(mean\)\)'):
        load_teacher(tmp_path/'b.pth', tiny_net())
    torch.save(madrylab_checkpoint(net, mean=(125.3,), std=(63.,)), tmp_path/'c.pth')
    with pytest.raises(ValueError, match=r'mean of \[125.3.*\], which does not fit images in \[0, 1\]: '
                                         r'pass `mean` and `std`'):
        load_teacher(tmp_path/'c.pth', tiny_net())

def test_legacy_format(net, tiny_net, x, tmp_path):
    torch.save(net.state_dict(), tmp_path/'a.pth', _use_new_zipfile_serialization=False)
    check(tmp_path/'a.pth', net, tiny_net, x)

def test_path_as_text_and_mean_and_std(net, tiny_net, x, tmp_path):
    torch.save(net.state_dict(), tmp_path/'a.pth')
    t = load_teacher(str(tmp_path/'a.pth'), tiny_net(), mean=[.4], std=[.2])
    close(t.probs(x), probs_of(net, (x-.4)/.2))

def test_model_given_is_not_changed(net, tiny_net, tmp_path):
    torch.save(net.state_dict(), tmp_path/'a.pth')
    model = tiny_net(); load_teacher(tmp_path/'a.pth', model)
    assert (all(torch.equal(a, b) for a,b in zip(model.state_dict().values(), tiny_net().state_dict().values()))
            and model.training)

@pytest.mark.parametrize('with_opt', [True, False])
@pytest.mark.parametrize('how', ['fit', 'fit_one_cycle', 'fine_tune', 'fit_exp', 'fit_rkd'])
def test_what_learn_save_writes(with_opt, how, make_learner, tiny_net, x):
    learn = make_learner(model=tiny_net())
    getattr(learn, how)(1, 1e-3)
    path = learn.save('teacher', with_opt=with_opt)
    check(path, learn.model, tiny_net, x)

def test_missing_file(tiny_net, tmp_path):
    with pytest.raises(ValueError, match='no teacher file'): load_teacher(tmp_path/'none.pth', tiny_net())
    with pytest.raises(ValueError, match='is a folder: .*load_run'): load_teacher(tmp_path, tiny_net())
    with pytest.raises(FileNotFoundError): load_teacher(tmp_path/'none.pth', tiny_net())
    with pytest.raises(ValueError): load_teacher(tmp_path, tiny_net()) # a folder

@pytest.mark.parametrize('kept', [0., .01, .3, .7, .99])
@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.safetensors', 'legacy'])
def test_truncated(kept, suffix, net, tiny_net, tmp_path):
    path = tmp_path/('a.pth' if suffix == 'legacy' else f'a{suffix}')
    if suffix == '.safetensors': save_file(net.state_dict(), path)
    else: torch.save(net.state_dict(), path, _use_new_zipfile_serialization=suffix != 'legacy')
    data = path.read_bytes(); path.write_bytes(data[:int(kept*len(data))])
    with warnings.catch_warnings(), pytest.raises(ValueError, match=path.name):
        warnings.simplefilter('ignore')
        load_teacher(path, tiny_net())

def test_another_architecture(net, tiny_net, tmp_path):
    for suffix in ('.pth', '.safetensors'):
        path = tmp_path/f'a{suffix}'; save(net.state_dict(), path)
        for other in (cifar_resnet18(width=1/16, n_in=1), tiny_net(n_out=7), tiny_net(n_in=3), tiny_net(bn=False)):
            with pytest.raises(ValueError, match='architecture'): load_teacher(path, other)

@pytest.mark.parametrize('content', [[1, 2], torch.rand(3), {0: torch.rand(3)}, {}, {'epoch': 3}, 'text', 7, None,
                                     {'state_dict': {}}, {'state_dict': [1]}, []],
                         ids=['list', 'tensor', 'integer keys', 'empty', 'no weights', 'text', 'number', 'none',
                              'wrapped empty', 'wrapped list', 'empty list'])
def test_no_weights(content, tiny_net, tmp_path):
    torch.save(content, tmp_path/'a.pth')
    with pytest.raises(ValueError, match=r'a.pth.*save `model.state_dict\(\)`'):
        load_teacher(tmp_path/'a.pth', tiny_net())

@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.safetensors'])
def test_garbage(suffix, tiny_net, tmp_path):
    (tmp_path/f'a{suffix}').write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match=f'a{suffix}'): load_teacher(tmp_path/f'a{suffix}', tiny_net())

@pytest.mark.parametrize('suffix', ['.pkl', '.bin', '', '.PTH2'])
def test_unknown_suffix(suffix, net, tiny_net, tmp_path):
    torch.save(net.state_dict(), tmp_path/f'a{suffix}')
    with pytest.raises(ValueError, match='safetensors'): load_teacher(tmp_path/f'a{suffix}', tiny_net())

class Bomb:
    "Makes a folder when unpickled"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)

@pytest.mark.parametrize('layout', ['zip', 'legacy', 'plain pickle', 'beside weights', 'whole module', 'builtins'])
@pytest.mark.parametrize('suffix', ['.pth', '.pt'])
def test_malicious_pickle_is_not_executed(layout, suffix, net, tiny_net, tmp_path):
    path, marker = tmp_path/f'a{suffix}', tmp_path/'marker'
    if layout == 'zip': torch.save(Bomb(marker), path)
    elif layout == 'legacy': torch.save(Bomb(marker), path, _use_new_zipfile_serialization=False)
    elif layout == 'plain pickle': path.write_bytes(pickle.dumps({'state_dict': Bomb(marker)}))
    elif layout == 'beside weights': torch.save({'state_dict': net.state_dict(), 'extra': Bomb(marker)}, path)
    elif layout == 'builtins':
        path.write_bytes(b"cbuiltins\nexec\n(S'import os; os.mkdir(" + repr(str(marker)).encode().replace(b"'", b'"')
                         + b")'\ntR.")
    else: net.bomb = Bomb(marker); torch.save(net, path)
    with pytest.raises(ValueError, match=path.name): load_teacher(path, tiny_net())
    assert not marker.exists()
    # the file is live: an ordinary unpickler is caught by it
    if layout != 'whole module' and layout != 'plain pickle' and layout != 'builtins':
        torch.load(path, weights_only=False); assert marker.exists()
    elif layout != 'whole module': pickle.loads(path.read_bytes()); assert marker.exists()

def test_message_says_what_to_do(net, tiny_net, tmp_path):
    torch.save(Bomb(tmp_path/'marker'), tmp_path/'a.pth')
    with pytest.raises(ValueError, match='more than weights'): load_teacher(tmp_path/'a.pth', tiny_net())
    with pytest.raises(TypeError, match='model'): load_teacher(tmp_path/'a.pth', tiny_net)


# --- peers' teachers: as they say natively, and a student distils from just that ---

class NormInside(nn.Module):
    "As RobustBench's networks are: pixel space in, the normalisation a part of `forward`"
    def __init__(self, model):
        super().__init__()
        self.model = model
        for k,v in dict(mu=[.49, .48, .45], sigma=[.25, .24, .26]).items():
            self.register_buffer(k, torch.tensor(v).view(1,3,1,1))
    def forward(self, x): return self.model((x - self.mu)/self.sigma)

class NormInPlace(NormInside):
    "The same, sparing of memory"
    def forward(self, x): return self.model(x.sub_(self.mu).div_(self.sigma))

def with_bn_statistics(net):
    "With BatchNorm statistics that are no longer the initial ones, in eval mode"
    with torch.no_grad():
        for _ in range(5): net(torch.rand(8, 3, 8, 8))
    return net.eval()

imagenet, half = ((.485, .456, .406), (.229, .224, .225)), ((.5,)*3, (.5,)*3)
# a network and the mean and std that its input is to be normalised by
peers = {
    'torchvision resnet': (lambda: torchvision.models.resnet18(num_classes=10), imagenet),
    'timm resnet': (lambda: timm.create_model('test_resnet', num_classes=10), half),
    'timm ViT': (lambda: timm.create_model('test_vit', img_size=8, patch_size=4, num_classes=10), half),
    'RobustBench': (lambda: NormInside(wide_resnet(10, 1)), (None, None)),
    'RobustBench, in place': (lambda: NormInPlace(cifar_resnet18(10, 1/8)), (None, None))}

def natively(net, mean=None, std=None):
    "What the network's author would write"
    if mean is None: return lambda x: net(x.clone()).softmax(1).detach()
    m, s = (torch.tensor(o).view(1,-1,1,1) for o in (mean, std))
    return lambda x: net((x-m)/s).softmax(1).detach()

def student(dls, tiny_net, make_learner):
    "Whose normalisation is not the teacher's; plain SGD"
    dls.add_tfms([Normalize.from_stats([.2, .3, .4], [.3, .25, .35], cuda=False)], 'after_batch')
    return (make_learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(8), tiny_net(n_in=3)), opt_func=SGD),
            ([.2, .3, .4], [.3, .25, .35]))

@pytest.mark.few(8)
@pytest.mark.parametrize('suffix,method', [('', 'akd'), ('', 'rslad'), ('.pth', 'akd'), ('.safetensors', 'akd')])
@pytest.mark.parametrize('name', peers)
def test_networks_of_peers(name, suffix, method, tmp_path, make_dls, make_learner, tiny_net, check_distillation):
    "As a network in memory and from a file of its weights"
    make, (mean, std) = peers[name]
    net, x = with_bn_statistics(make()), torch.rand(6, 3, 8, 8)
    if suffix: save(net.state_dict(), tmp_path/f'a{suffix}')
    teacher = load_teacher(tmp_path/f'a{suffix}', make(), mean, std) if suffix else Teacher(net, mean=mean, std=std)
    native, kept = natively(net, mean, std), x.clone()
    close(teacher.probs(x), native(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(x, kept) and native(x).std(0).max() > 1e-4 # it tells images apart
    learn, stats = student(make_dls(n=32, bs=16, channels=3), tiny_net, make_learner)
    check_distillation(learn, teacher, native, method, stats, eps=.1, lr=1.) # a long step, that small differences show

@pytest.mark.filterwarnings('ignore:.*load_learner')
@pytest.mark.parametrize('exported', [False, True])
def test_learner_of_a_peer(exported, tmp_path, make_dls, make_learner, tiny_net, check_distillation):
    """With ImageNet statistics; as a Learner and as the file of an exported one, fastai's own answers on the
    validation set"""
    learn = make_learner(make_dls(n=32, bs=16, channels=3, stats=imagenet_stats), tiny_net(n_in=3, seed=7))
    learn.fit(1, .01); learn.model.eval()
    dls = make_dls(n=32, bs=16, channels=3)
    pixels = torch.cat([x.as_subclass(torch.Tensor) for x,_ in dls.valid])
    if exported: learn.export('peer.pkl')
    teacher = Teacher(load_learner(tmp_path/'peer.pkl') if exported else learn)
    close(teacher.probs(pixels), learn.get_preds()[0].as_subclass(torch.Tensor), rtol=1e-4, atol=1e-5)
    native = natively(learn.model, *imagenet_stats)
    close(teacher.probs(pixels), native(pixels), rtol=1e-4, atol=1e-5)
    s, stats = student(dls, tiny_net, make_learner)
    check_distillation(s, teacher, native, stats=stats)

@pytest.fixture
def cifar_images():
    "The 20 CIFAR-10 test images that foolbox ships, uint8; the label is in the file name"
    folder = find_spec('foolbox') and Path(find_spec('foolbox').origin).parent/'data'
    files = sorted(folder.glob('cifar10_*.png')) if folder else []
    if len(files) != 20: pytest.skip('needs the images that foolbox ships')
    return np.stack([np.array(Image.open(f).convert('RGB')) for f in files]), np.array(
        [int(f.stem.split('_')[-1]) for f in files])

def test_published_checkpoint(cifar_images, make_learner, tiny_net, check_distillation):
    """A CIFAR-10 ResNet-18 that AutoAttack's authors publish, plainly trained on raw pixels; beside their code, it
    is our architecture too"""
    folder = find_spec('pyautoattack') and Path(find_spec('pyautoattack').origin).parent/'examples'
    if not (folder and (folder/'model_test.pt').exists()): pytest.skip('needs the checkpoint that pyautoattack ships')
    spec = spec_from_file_location('aa_resnet', folder/'resnet.py')
    theirs = module_from_spec(spec)
    spec.loader.exec_module(theirs)
    reference = theirs.ResNet18()
    reference.load_state_dict(torch.load(folder/'model_test.pt', map_location='cpu', weights_only=True))
    reference.eval()
    imgs, y = cifar_images
    x, y = torch.tensor(imgs).permute(0,3,1,2).float()/255, torch.tensor(y)
    native = natively(reference)
    for model in (theirs.ResNet18(), cifar_resnet18()):
        teacher = load_teacher(folder/'model_test.pt', model)
        with torch.no_grad(): close(teacher(x), reference(x), rtol=1e-5, atol=1e-5)
        close(teacher.probs(x), native(x), rtol=1e-4, atol=1e-5)
    assert (teacher.probs(x).argmax(1) == y).all() and robust_accuracy(teacher, x[:10], y[:10], PGD(steps=5)) < .2
    learn, stats = student(arrays_dls((imgs[:8], y[:8].numpy()), (imgs[8:10], y[8:10].numpy()), vocab=list(range(10)),
                                      bs=8), tiny_net, make_learner)
    check_distillation(learn, teacher, native, stats=stats)
