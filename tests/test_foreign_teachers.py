"""Teachers of RobustBench, timm and torchvision answer as their networks do natively, `Teacher.check` tells the
truth, and so do TRADES's start and a WideResNet's own normalisation."""
import copy, random, re, sys, types, warnings
from unittest.mock import patch

import numpy as np, pytest, timm, torch, torch.nn as nn, torch.nn.functional as F, torchvision
from fastai.vision.all import DataBlock, Image, ImageBlock, MultiCategoryBlock, Normalize
from torchvision.models._api import WeightsEnum

from rkd_fastai.all import *
from rkd_fastai import teachers
from rkd_fastai.evaluation import robustness as evaluation
from rkd_fastai.sampling import sample_positions
from rkd_fastai.teachers import check_teacher

def probs(net, x):
    with torch.no_grad(): return net(x).softmax(1)
def norm(x, mean, std):
    m, s = (torch.tensor(o, dtype=torch.float32).view(1,-1,1,1) for o in (mean, std))
    return (x - m)/s
close = torch.testing.assert_close
CIFAR10 = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']


# --- RobustBench ---

@pytest.fixture
def robustbench(monkeypatch, tiny_net):
    "A package with one network, that keeps what it was asked"
    asked, net = [], tiny_net(n_in=3, seed=5).train()
    def load_model(model_name='Standard', model_dir='./models', dataset='cifar10', threat_model='Linf',
                   custom_checkpoint='', norm=None):
        asked.append(dict(model_name=model_name, model_dir=model_dir, dataset=dataset, threat_model=threat_model))
        if dataset not in ('cifar10', 'cifar100', 'imagenet'):
            raise ValueError(f"'{dataset}' is not a valid BenchmarkDataset") # as its enums do
        if threat_model not in ('Linf', 'L2', 'corruptions'):
            raise ValueError(f"'{threat_model}' is not a valid ThreatModel")
        return {'Engstrom2019Robustness': net}[model_name]
    utils = types.ModuleType('robustbench.utils'); utils.load_model = load_model
    package = types.ModuleType('robustbench'); package.utils, package.__path__ = utils, []
    monkeypatch.setitem(sys.modules, 'robustbench', package)
    monkeypatch.setitem(sys.modules, 'robustbench.utils', utils)
    return asked, net

def test_robustbench_is_asked_rightly(robustbench):
    asked, net = robustbench
    t = Teacher.from_robustbench('Engstrom2019Robustness', threat_model='L2', model_dir='/somewhere')
    assert asked == [dict(model_name='Engstrom2019Robustness', model_dir='/somewhere',
                          dataset='cifar10', threat_model='L2')]
    x = torch.rand(5, 3, 8, 8)
    # it normalises inside: pixel space as it is
    close(t.probs(x), probs(copy.deepcopy(net).eval(), x), rtol=1e-5, atol=1e-6)
    assert t.vocab == CIFAR10 and Teacher.from_robustbench('Engstrom2019Robustness', 'cifar100').vocab == []
    assert asked[-1] == dict(model_name='Engstrom2019Robustness', model_dir='./models',
                             dataset='cifar100', threat_model='Linf')
    assert net.training and all(p.requires_grad for p in net.parameters()) # ours is a copy

@pytest.mark.parametrize('args', [('Engstrom',), ('Engstrom2019Robustness', 'mnist'),
                                  ('Engstrom2019Robustness', 'cifar10', 'L1')])
def test_robustbench_without_such_a_network(args, robustbench):
    with pytest.raises(ValueError, match='RobustBench has no network .*' + args[-1]) as e:
        Teacher.from_robustbench(*args)
    assert isinstance(e.value.__cause__, (KeyError, ValueError))

@pytest.mark.parametrize('package,call', [('robustbench', lambda: Teacher.from_robustbench('Standard')),
                                          ('timm', lambda: Teacher.from_timm('resnet18'))])
def test_package_that_is_absent(package, call, monkeypatch):
    for name in (package, f'{package}.utils'): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f'`pip install {package}`'): call()

def test_cifar10_classes_in_order(robustbench, make_dls):
    "DataLoaders with the same names in another order are refused; other names are not known to be wrong"
    t = Teacher.from_robustbench('Engstrom2019Robustness')
    imgs, y = np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 10
    dls = lambda vocab: arrays_dls((imgs, y), (imgs, y), vocab=vocab, bs=10)
    check_teacher(t, dls(CIFAR10)); check_teacher(t, dls(list(range(10))))
    for vocab in (CIFAR10[::-1], [*CIFAR10[:8], 'truck', 'ship']):
        with pytest.raises(ValueError, match='orders the classes'): check_teacher(t, dls(vocab))
    with pytest.raises(ValueError, match='knows 10 classes, but `dls` have 11'):
        check_teacher(t, dls([*CIFAR10, 'frigate']))


# --- timm ---

@pytest.mark.parametrize('name,kw,size', [('test_byobnet', {}, 32), ('test_efficientnet', dict(num_classes=7), 32),
                                          ('test_convnext', {}, 32), ('test_vit', dict(img_size=32), 32),
                                          ('test_resnet', dict(pretrained_cfg_overlay=dict(mean=(.1, .2, .3),
                                                                                           std=(.4, .5, .6))), 32),
                                          ('test_nfnet', {}, 32)])
def test_timm_natively(name, kw, size):
    """As timm's network on normalised images, whose statistics differ from network to network; with statistics of
    BatchNorm that are not the initial ones"""
    torch.manual_seed(1)
    with patch.object(timm, 'create_model', side_effect=timm.create_model) as made:
        t = Teacher.from_timm(name, pretrained=False, **kw)
    assert made.call_args.kwargs['pretrained'] is False
    torch.manual_seed(1)
    net = timm.create_model(name, pretrained=False, **kw)
    for n in (net, t.members[0].model): # the same weights, in which differences show
        g = torch.Generator().manual_seed(2)
        for k,v in n.state_dict().items():
            if v.is_floating_point():
                v.copy_(torch.rand(v.shape, generator=g) + .5 if 'var' in k
                        else v + .05*torch.randn(v.shape, generator=g))
    cfg = timm.data.resolve_data_config({}, model=net)
    x = torch.rand(3, 3, size, size)
    native = probs(net.eval(), norm(x, cfg['mean'], cfg['std']))
    close(t.probs(x), native, rtol=1e-3, atol=1e-5)
    assert (native - probs(net, x)).abs().max() > 1e-4 and native.std(0).max() > 1e-5 # the normalisation matters here
    assert not t.training and not any(p.requires_grad for p in t.parameters())

def test_timm_loads_weights_by_default():
    with patch.object(timm, 'create_model', side_effect=(
            lambda name, pretrained, **kw: timm.models.create_model(name, num_classes=4))) as made:
        Teacher.from_timm('test_resnet', num_classes=4)
    assert made.call_args.args == ('test_resnet',) and made.call_args.kwargs == dict(pretrained=True, num_classes=4)
    with pytest.raises(Exception, match='no_such_network'): Teacher.from_timm('no_such_network', pretrained=False)

@pytest.mark.parametrize('stats', [{}, dict(mean=.3, std=[.2])], ids=['its own','given'])
def test_timm_in_other_channels(stats, make_dls, make_learner):
    """Grey images are normalised by the mean of the network's own statistics, or by what is given; there is none for
    two channels"""
    own = dict(mean=(.1, .2, .6), std=(.4, .5, .9))
    make = lambda **kw: Teacher.from_timm(
        'test_resnet', pretrained=False, num_classes=10, pretrained_cfg_overlay=own, **kw)
    t, x = make(in_chans=1, **stats), torch.rand(3, 1, 32, 32)
    net = t.members[0].model
    close(t.probs(x), probs(net, (x - .3)/(.2 if stats else .6)), rtol=1e-4, atol=1e-6)
    assert make_learner().to_rkd(t).cbs[-1].teacher is t # it runs on grey images
    if stats:
        close(make(in_chans=2, mean=[.1, .2], std=.5).members[0].mean.flatten(), torch.tensor([.1, .2]))
        with pytest.raises(ValueError, match='both `mean` and `std`'): make(mean=.3)
    else:
        with pytest.raises(ValueError, match='`in_chans` is 2.*pass `mean` and `std` with 2'): make(in_chans=2)
        with pytest.raises(ValueError, match='have 3 values, but the images have 1 channels'): make().probs(x)

def test_torchvision_with_other_statistics():
    w = torchvision.models.ResNet18_Weights.DEFAULT
    with patch.object(teachers, 'get_model', return_value=nn.Flatten()):
        t = Teacher.from_torchvision(w, mean=[.1, .2, .3], std=.5)
    close(t.members[0].mean.flatten(), torch.tensor([.1, .2, .3]))
    close(t.members[0].std.flatten(), torch.tensor([.5]))

def test_members_on_several_devices(make_dls, tiny_net):
    "Which is what the error is about, not the images"
    t = Teacher([tiny_net(), tiny_net(seed=1)])
    t.members[1].to('meta')
    with pytest.raises(ValueError, match=r"`teacher` is on several devices, cpu and meta: "
                                         r"move all of it to one, `teacher.to\('cpu'\)`"):
        check_teacher(t, make_dls())


# --- torchvision ---

enums = [w for m in torchvision.models.list_models(module=torchvision.models)
         for w in [torchvision.models.get_model_weights(m)]]

def test_every_classifier_of_torchvision():
    "The network's name, derived from that of its weights, is the one that torchvision keeps them for"
    for name,enum in zip(torchvision.models.list_models(module=torchvision.models), enums):
        for w in enum:
            if w.meta['categories'] is None: # VGG-16's features
                with patch.object(teachers, 'get_model') as got, pytest.raises(ValueError, match='no class names'):
                    Teacher.from_torchvision(w)
                assert not got.called
                continue
            for given in (w, str(w)):
                with patch.object(teachers, 'get_model', return_value=nn.Flatten()) as got:
                    t = Teacher.from_torchvision(given)
                assert got.call_args.args == (name,) and got.call_args.kwargs == dict(weights=w)
                assert t.vocab == w.meta['categories'] and len(t.vocab) == 1000
                tfms, m = w.transforms(), t.members[0]
                close(m.mean.flatten(), torch.tensor(tfms.mean)); close(m.std.flatten(), torch.tensor(tfms.std))
    assert len(enums) > 70 and {w for m in vars(torchvision.models).values() if isinstance(m, type)
                                and issubclass(m, WeightsEnum) for w in m} == {w for e in enums for w in e}

@pytest.mark.parametrize('name,weights', [('mobilenet_v3_small', 'MobileNet_V3_Small_Weights.DEFAULT'),
                                          ('shufflenet_v2_x0_5', 'ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1'),
                                          ('googlenet', 'GoogLeNet_Weights.DEFAULT')])
def test_torchvision_natively(name, weights, monkeypatch):
    "With made-up weights instead of a download"
    w = torchvision.models.get_weight(weights)
    torch.manual_seed(0)
    kw = dict(init_weights=False) if name == 'googlenet' else {}
    made = torchvision.models.get_model(name, **kw)
    for m in made.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = None # statistics of what it sees now, in which images differ
    with torch.no_grad(): made(torch.rand(4, 3, 64, 64))
    state = made.state_dict()
    monkeypatch.setattr(type(w), 'get_state_dict', lambda self, *a, **k: state)
    t = Teacher.from_torchvision(weights)
    net = torchvision.models.get_model(name, weights=w).eval()
    x, tfms = torch.rand(2, 3, 64, 64), w.transforms()
    with torch.no_grad(): want = net(norm(x, tfms.mean, tfms.std)).softmax(1)
    close(t.probs(x), want, rtol=1e-2, atol=1e-3) # small variances, by which rounding is divided
    assert (want - probs(net, x)).abs().max() > 1e-2 and t.probs(x).shape == (2, 1000)

def test_torchvision_without_such_weights():
    for bad in ('ResNet50_Weights.NONE', 'NoNet_Weights.DEFAULT'):
        with pytest.raises((ValueError, KeyError, AttributeError), match='N'): Teacher.from_torchvision(bad)


# --- `Teacher.check` ---

@pytest.mark.parametrize('stats', [None, ([.3], [.25])], ids=['', 'normalised'])
def test_check_against_hand_counted(stats, make_dls, robust_net, digits):
    "Clean and under FGSM, on the validation images in pixel space; the teacher is not normalised"
    t, dls = Teacher(robust_net), make_dls(n=64, n_valid=70, n_test=20, stats=stats)
    x, y = digits.x[64:134], digits.y[64:134]
    x_adv = x.clone().requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(robust_net(x_adv), y), x_adv)
    x_adv = (x + .15*g.sign()).clamp(0, 1)
    right, robust = (robust_net(o).argmax(1) == y for o in (x, x_adv))
    for n in (70, 40, 33):
        card = t.check(dls, ('clean', 'fgsm'), eps=.15, n=n, bs=16)
        idx = sample_positions(y, n)
        assert card.clean == pytest.approx(right[idx].float().mean().item(), abs=1e-7) and card.n == n
        assert card.fgsm == pytest.approx((right & robust)[idx].float().mean().item(), abs=1e-7)
    assert t.check(dls, 'clean').n == 70 and t.check(dls, 'clean',
                                                     n=1000).clean == pytest.approx(right.float().mean().item())
    assert (right & robust).float().mean() < right.float().mean() < 1 or robust.any()

def test_check_of_a_normalised_teacher(make_dls, tiny_net, digits):
    "The teacher's statistics are its own, those of the DataLoaders the student's"
    net = tiny_net(seed=3).eval()
    t = Teacher(net, mean=[.7], std=[.1])
    want = (net((digits.x[64:124]-.7)/.1).argmax(1) == digits.y[64:124]).float().mean().item()
    other = (net(digits.x[64:124]).argmax(1) == digits.y[64:124]).float().mean().item()
    got = t.check(make_dls(n=64, n_valid=60, stats=([.3], [.25])), 'clean').clean
    assert got == pytest.approx(want) and want != other

def test_check_is_seeded_and_leaves_things_alone(make_dls, robust_net, snapshot):
    "Global random numbers, the teacher, the DataLoaders; the same seed, the same number"
    t, dls = Teacher(robust_net), make_dls(n=64, n_valid=100, stats=([.3], [.25]))
    before, transforms = snapshot.take(t), [[type(f) for f in dl.after_batch.fs] for dl in dls.loaders]
    random.seed(1); np.random.seed(1); torch.manual_seed(1)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    card = t.check(dls, ('clean', 'pgd2', 'pgd1x2'), eps=.15)
    assert (random.getstate() == state[0] and np.random.get_state()[1].tolist() == state[1]
            and torch.equal(torch.get_rng_state(), state[2]))
    assert (snapshot.same(before, snapshot.take(t))
            and transforms == [[type(f) for f in dl.after_batch.fs] for dl in dls.loaders])
    torch.manual_seed(7)
    assert t.check(dls, ('clean', 'pgd2', 'pgd1x2'), eps=.15).results == card.results
    assert len({tuple(t.check(dls, 'pgd1x2', eps=.15, seed=s).results.values()) for s in range(6)}) > 1
    assert 0 < card.pgd2 < card.clean and card.eps == .15

def test_check_of_an_ensemble_is_that_of_its_vote(make_dls, robust_net, plain_net, digits):
    t = Teacher([robust_net, plain_net], betas=[.3, .7])
    x, y = digits.x[64:164], digits.y[64:164]
    want = ((.3*probs(robust_net, x) + .7*probs(plain_net, x)).argmax(1) == y).float().mean().item()
    assert t.check(make_dls(n=64, n_valid=100), 'clean').clean == pytest.approx(want)

def test_check_refuses_what_does_not_fit(make_dls, make_learner, tiny_net, tmp_path):
    dls = make_dls()
    with pytest.raises(ValueError, match='knows 7 classes'): Teacher(tiny_net(n_out=7)).check(dls)
    with pytest.raises(ValueError, match='cannot run on the DataLoaders.*Use images of the size'):
        Teacher(tiny_net(n_in=3)).check(dls)
    with pytest.raises(ValueError, match='cannot run on the DataLoaders'):
        Teacher(tiny_net()).check(make_dls(channels=3))
    t = Teacher(tiny_net()); t.vocab = list(range(9, -1, -1))
    with pytest.raises(ValueError, match='orders the classes'): t.check(dls)
    for n in (0, -3):
        with pytest.raises(ValueError, match='`n`'): Teacher(tiny_net()).check(dls, n=n)
    with pytest.raises(ValueError, match='unknown attack'): Teacher(tiny_net()).check(dls, 'pdg20')
    for i in range(8): Image.fromarray(np.full((8, 8, 3), 30*i, np.uint8)).save(tmp_path/f'{i}.png')
    multi = DataBlock((ImageBlock, MultiCategoryBlock), get_items=lambda p: sorted(p.glob('*.png')),
                      get_y=lambda p: [str(int(p.stem) % 2), 'all']).dataloaders(tmp_path, bs=2, num_workers=0)
    with pytest.raises(ValueError, match='multi-label'): Teacher(tiny_net(n_in=3, n_out=multi.c)).check(multi)

@pytest.mark.parametrize('mean', [[.5]*3, [.1, .2, .3]])
def test_check_refuses_grey_images_for_a_colour_teacher(mean, make_dls, tiny_net):
    "Its normalisation would make three channels of one without a word"
    with pytest.raises(ValueError, match='cannot run on the DataLoaders'):
        Teacher(tiny_net(n_in=3), mean=mean, std=[.5]*3).check(make_dls())
    with pytest.raises(ValueError, match='cannot run on the DataLoaders'):
        Teacher([Teacher(tiny_net(n_in=3), mean=mean, std=[.5]*3)]*2).check(make_dls())
    Teacher(tiny_net(n_in=3), mean=mean, std=[.5]*3).check(make_dls(channels=3), 'clean')


# --- a WideResNet's own normalisation ---

@pytest.mark.parametrize('mean,std', [((.49, .48, .45), (.25, .24, .26)), (.5, .2),
                                      (np.array([.4, .5, .6]), np.array([.1, .2, .3])), ((.5,), [.2]),
                                      (.3, (.1, .2, .3))])
def test_wide_resnet_normalises(mean, std):
    torch.manual_seed(0); net = wide_resnet(10, 1, mean=mean, std=std)
    torch.manual_seed(0); bare = wide_resnet(10, 1)
    assert (net.state_dict().keys() == bare.state_dict().keys()
            and not any(k in ('mean', 'std') for k in net.state_dict()))
    x = torch.rand(4, 3, 8, 8)
    m, s = (torch.tensor(np.array(o), dtype=torch.float32).view(1,-1,1,1) for o in (mean, std))
    for _ in range(3): close(net(x), bare((x-m)/s), rtol=1e-5, atol=1e-5) # in train mode, which wears BatchNorm in
    close(net.eval()(x), bare.eval()((x-m)/s), rtol=1e-5, atol=1e-5)
    t = Teacher(net)
    close(t.probs(x), Teacher(bare, mean=np.broadcast_to(mean, 3).copy(), std=np.broadcast_to(std, 3).copy()).probs(x),
          rtol=1e-4, atol=1e-5)
    assert (t.probs(x) - Teacher(bare).probs(x)).abs().max() > 1e-3
    assert net.double()(x.double()).dtype == torch.float64

def test_wide_resnet_defaults_and_bad_statistics():
    x = torch.rand(2, 1, 8, 8)
    torch.manual_seed(0); a = wide_resnet(10, 1, n_in=1).eval()
    torch.manual_seed(0); b = wide_resnet(10, 1, n_in=1, mean=0., std=1.).eval()
    assert torch.equal(a(x), b(x))
    for kw in (dict(mean=(.1, .2)), dict(std=(.1, .2)), dict(std=0.), dict(std=(.1, .2, 0.)), dict(std=-1.),
               dict(std=float('nan')), dict(n_in=1, mean=(.1, .2, .3))):
        with pytest.raises(ValueError, match='`mean`|`std`'): wide_resnet(10, 1, **kw)


# --- a start around the image, as TRADES has it ---

@pytest.mark.parametrize('objective', ['ce', 'kl'])
@pytest.mark.parametrize('start,eps', [(.001, .05), (.001, .0005), (.5, .1)])
def test_start_around_the_image(start, eps, objective, tiny_net, digits):
    "Against a plain loop in float64, with the same noise: `x + 0.001*randn`, into the ball and [0, 1], then the steps"
    net, x, y = tiny_net(seed=3).eval(), digits.x[:20], digits.y[:20]
    net64 = copy.deepcopy(net).double()
    targ = y if objective == 'ce' else net(x).softmax(1).detach()
    torch.manual_seed(5)
    got = PGD(eps, steps=3, step_size=eps/3, random_start=start, objective=objective)(net, x, targ)
    torch.manual_seed(5)
    x64 = x.double()
    into = lambda a: torch.minimum(torch.maximum(a, x64 - eps), x64 + eps).clamp(0, 1)
    want = into(x64 + start*torch.randn(x.shape).double())
    q = net64(x64).softmax(1).detach()
    for _ in range(3):
        want = want.detach().requires_grad_()
        z = net64(want)
        loss = F.cross_entropy(z, y, reduction='sum') if objective == 'ce' else (q*(q.log() - z.log_softmax(1))).sum()
        g, = torch.autograd.grad(loss, want)
        want = into(want.detach() + eps/3*g.sign())
    assert ((got.double() - want).abs() < 1e-5).float().mean() > .995 # the sign of a vanishing gradient is anyone's
    assert (got - x).abs().max() <= eps + 1e-7 and got.min() >= 0 and got.max() <= 1

def test_random_start_without_steps(tiny_net):
    "Of no steps the start is left: normal, of that size, in every image another; 1 is True"
    x = torch.full((50, 1, 8, 8), .5)
    targ, net = torch.zeros(50).long(), tiny_net()
    d = PGD(.4, steps=0, random_start=.01)(net, x, targ) - x
    assert .0095 < d.std() < .0105 and d.abs().max() > .03 and not torch.equal(d[0], d[1]) and abs(d.mean()) < 1e-3
    assert (d.abs() < .01).float().mean() == pytest.approx(.683, abs=.03) # a normal distribution, not a uniform one
    d = PGD(.02, steps=0, random_start=.5)(net, x, targ) - x
    assert d.abs().max() <= .02 + 1e-7 and (d.abs() > .0199).float().mean() > .9
    d = PGD(.4, steps=0, norm='L2', random_start=.01)(net, x, targ) - x
    assert d.flatten(1).norm(dim=1).mean() == pytest.approx(.08, rel=.1)
    d = PGD(.1, steps=0, norm='L2', random_start=.5)(net, x, targ) - x
    assert d.flatten(1).norm(dim=1).max() <= .1 + 1e-6
    torch.manual_seed(0); a = PGD(.1, steps=0, random_start=True)(net, x, targ)
    torch.manual_seed(0); b = PGD(.1, steps=0, random_start=1)(net, x, targ)
    assert (torch.equal(a, b) and torch.equal(PGD(.1, steps=0, random_start=0.)(net, x, targ), x)
            and torch.equal(PGD(.1, steps=0, random_start=False)(net, x, targ), x))
    for bad in (-.001, float('nan'), float('inf')):
        with pytest.raises(ValueError, match='`random_start`'): PGD(random_start=bad)
    assert eval(repr(PGD(.1, random_start=.001))).settings == PGD(.1, random_start=.001).settings


# --- a teacher that knows nothing ---

guessing = '`teacher` classifies .* validation images correctly, which is no better than guessing'

class Asked(nn.Module):
    "Counts the images it is asked about"
    def __init__(self, net): super().__init__(); self.net, self.n = net, 0
    def forward(self, x): self.n += len(x); return self.net(x)

@pytest.fixture
def ordered(digits):
    "A validation set that is ordered by class, normalised as a network of `lost` was trained"
    order = digits.y[1000:1400].argsort(stable=True) + 1000
    dls = arrays_dls((digits.imgs[:96], digits.labels[:96]), (digits.imgs[order], digits.labels[order]),
                     vocab=list(range(10)), bs=32)
    dls.add_tfms([Normalize.from_stats([.3], [.02], cuda=False)], 'after_batch')
    return dls

class Denormalised(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x*.02 + .3)

def test_teacher_that_lost_its_normalisation(ordered, plain_net, make_learner):
    """Counted by hand on 200 images of a set that is ordered by class; the Learner, or `mean` and `std`, bring it
    back without a word"""
    lost = Denormalised(plain_net) # what it takes is normalised
    learn = make_learner(ordered, lost)
    with pytest.warns(UserWarning, match=guessing + ".*on images normalised by the DataLoaders it would be "
                                                    "(1..|200) of 200 .*`learn.model` does not include"
                                                    ".*give the Learner itself"):
        make_learner(ordered).to_rkd(lost, 'ckd').fit(1)
    for teacher in (learn, Teacher(lost, mean=.3, std=.02), plain_net):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            make_learner(ordered).to_rkd(teacher, 'ckd').fit(1)

def test_teacher_at_chance_is_asked_once(make_dls, make_learner, tiny_net):
    "About all validation images where there are few, and said of 50 at least; the student's bits are the same"
    blind = tiny_net(); blind[-1].weight.data.zero_()
    ends = []
    for n_valid in (48, 70, 300):
        torch.manual_seed(0); random.seed(0); np.random.seed(0)
        teacher = Teacher(Asked(blind))
        learn = make_learner(make_dls(n_valid=n_valid, shuffle=False)).to_rkd(teacher, 'akd', attack=PGD(.1, steps=1))
        before = teacher.members[0].model.n
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter('always')
            learn.fit(1); learn.fit(1)
        # two epochs, two checks that it fits
        assert teacher.members[0].model.n - before == 2*96 + 2*2 + min(n_valid, 200)
        assert [bool(re.match(guessing, str(w.message))) for w in messages] == [True]*(n_valid >= 50)
        ends.append((random.random(), np.random.rand(), torch.rand(1).item(),
                     *[v.sum().item() for v in learn.model.state_dict().values()]))
    assert ends[0] == ends[1] == ends[2]

def test_teachers_that_are_not_warned_of(make_dls, digits, plain_net):
    "A good one of images that are nearly all of one class, or all; and where nothing can be said"
    for few in (0, 3):
        y = np.where(np.arange(200) < 200-few, 4, 7)
        imgs = np.stack([digits.imgs[(digits.labels == c).nonzero()[0][i % 100]] for i,c in enumerate(y)])
        dls = arrays_dls((imgs, y), (imgs, y), vocab=list(range(10)), bs=32)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            evaluation.warn_if_chance(Teacher(plain_net), dls)
