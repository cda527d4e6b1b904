"Any architecture a fastai user has: each distillation step is the one that plain PyTorch computes from the same state."
import copy, os, re, subprocess, sys
from pathlib import Path

import numpy as np, pytest, timm, torch, torch.nn as nn, torchvision
from fastai.vision.all import (SGD, CrossEntropyLossFlat, Learner, Mish, Normalize, ProgressCallback, imagenet_stats,
                               resnet18, set_seed, vision_learner, xresnet18)
from torch.nn.utils.parametrizations import spectral_norm

from rkd_fastai.all import *

def noise_dls(size, channels=3, n=8, bs=4):
    "Random images and labels: a step can be checked on any"
    rng = np.random.default_rng(0)
    part = lambda n: (rng.integers(0, 256, (n,size,size,3) if channels == 3 else (n,size,size), dtype=np.uint8),
                      rng.integers(0, 10, n))
    return arrays_dls(part(n), part(2), vocab=list(range(10)), bs=bs)

def net(make):
    "A network of one's own, in a Learner"
    return lambda dls, **kw: Learner(dls, make(), **kw)
def unfrozen(dls, **kw):
    learn = vision_learner(dls, resnet18, **kw); learn.unfreeze()
    return learn
def head(n_in): return [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4*n_in, 10)]

half = [[.5]*3]*2
# size, channels, statistics of the Normalize that fastai adds, how a user builds it
archs = {
    'vision_learner': (32, 3, imagenet_stats, lambda dls, **kw: vision_learner(dls, resnet18, **kw)),
    'vision_learner, unfrozen': (32, 3, imagenet_stats, unfrozen),
    'vision_learner, one channel': (28, 1, None, lambda dls, **kw: vision_learner(
        dls, resnet18, n_in=1, pretrained=False, **kw)),
    'vision_learner, xresnet': (32, 3, None, lambda dls, **kw: vision_learner(dls, xresnet18, pretrained=False, **kw)),
    'vision_learner, convnext': (32, 3, imagenet_stats, lambda dls, **kw: vision_learner(dls, 'convnext_atto', **kw)),
    'vision_learner, ViT': (32, 3, half, lambda dls, **kw: vision_learner(
        dls, 'vit_tiny_patch16_224', img_size=32, patch_size=8, depth=2, **kw)),
    'timm ViT': (32, 3, None, net(lambda: timm.create_model(
        'test_vit', img_size=32, num_classes=10, drop_rate=.3, drop_path_rate=.3))),
    'xresnet, one channel, 8×8': (8, 1, None, net(lambda: xresnet18(n_out=10, c_in=1, act_cls=Mish))),
    'dropout': (8, 1, None, net(lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(.3),
        nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Dropout(.5), *head(8)))),
    'GroupNorm': (16, 3, None, net(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), *head(8)))),
    'in place': (16, 3, None, net(lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(8), nn.SiLU(inplace=True),
        nn.Dropout(.5, inplace=True), *head(8)))),
    'in place on the images': (16, 3, None, net(lambda: nn.Sequential(
        nn.Hardtanh(.2, .8, inplace=True), nn.Conv2d(3, 8, 3), nn.ReLU(), *head(8)))),
    'spectral norm': (16, 3, None, net(lambda: nn.Sequential(
        spectral_norm(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), nn.ReLU(), *head(8)))),
    '224×224': (224, 3, None, net(lambda: nn.Sequential(
        nn.Conv2d(3, 8, 8, 4), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, 2), nn.ReLU(inplace=True), *head(16))))}

@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    "Instead of the pretrained weights that fastai would download: all else is as with them"
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url',
                        lambda *args, **kw: torchvision.models.resnet18().state_dict())
    monkeypatch.setattr('timm.models._builder.load_pretrained', lambda *args, **kw: None)

@pytest.fixture
def silent(tmp_path):
    "A Learner with plain SGD, whose steps can be checked"
    def make(build, dls):
        learn = build(dls, loss_func=CrossEntropyLossFlat(), opt_func=SGD, path=tmp_path)
        learn.remove_cb(ProgressCallback); learn.logger = lambda *_: None
        return learn
    return make

def teacher_net(channels):
    "Small, and any size of image will do; it wants pixels normalised by .4 and .2"
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.Flatten(),
                         nn.Dropout(), nn.Linear(8*4, 10)).eval()

@pytest.mark.few(5)
@pytest.mark.parametrize('method', ['akd', 'rslad'])
@pytest.mark.parametrize('name', archs)
def test_steps_are_those_of_plain_pytorch(name, method, silent, check_distillation):
    size, channels, stats, build = archs[name]
    dls = noise_dls(size, channels, **(dict(n=2, bs=2) if size == 224 else {}))
    learn, net = silent(build, dls), teacher_net(channels)
    assert bool(stats) == any(isinstance(t, Normalize) for t in dls.after_batch.fs)
    check_distillation(learn, Teacher(net, mean=.4, std=.2), lambda x: net((x-.4)/.2).softmax(1).detach(),
                       method, stats)

def test_factory_builds_what_vision_learner_does(silent):
    "`rkd_learner(dls, arch, teacher)` is `vision_learner(dls, arch).to_rkd(teacher)`, to the last bit of the weights"
    def fit(build):
        set_seed(0)
        learn = silent(build, noise_dls(32)); set_seed(1); learn.fit(1, .02)
        return learn
    teacher, attack = Teacher(teacher_net(3)), PGD(steps=1)
    a, b = (fit(lambda dls, **kw: rkd_learner(dls, resnet18, teacher, attack=attack, **kw)),
            fit(lambda dls, **kw: vision_learner(dls, resnet18, **kw).to_rkd(teacher, attack=attack)))
    assert all(torch.equal(p, q) for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    assert [p.requires_grad for p in a.model.parameters()] == [p.requires_grad for p in b.model.parameters()]


# --- networks that return more than logits ---

class Two(nn.Module):
    "Features beside the logits: always, or only in training, as torchvision's GoogLeNet and Inception do"
    def __init__(self, always):
        super().__init__()
        self.body,self.head,self.always = nn.Sequential(nn.Flatten(), nn.Linear(64, 8),
                                                        nn.ReLU()), nn.Linear(8, 10), always
    def forward(self, x):
        h = self.body(x)
        return (self.head(h), h) if self.always or self.training else self.head(h)

@pytest.mark.parametrize('always', [True, False])
@pytest.mark.parametrize('method', ['at', 'trades', 'akd', 'rslad', 'ard', 'ckd'])
def test_tuple_of_logits_and_features(method, always, silent, snapshot):
    "The error names `model` and says what to do, before a weight has changed"
    learn = silent(net(lambda: Two(always)), noise_dls(8, 1))
    if method in ('at', 'trades'): learn.add_cb(AdversarialTraining() if method == 'at' else TRADES())
    else: learn.to_rkd(teacher_net(1), method)
    before = snapshot.take(learn.model)
    with pytest.raises(TypeError, match='(?s)`model` must return logits.*got tuple.*wrap it'): learn.fit(1)
    assert snapshot.same(before, snapshot.take(learn.model))


# --- what a user reads ---

script = '''
from fastai.vision.all import *
print('--- rkd_fastai', file=sys.stderr)
from rkd_fastai.all import *
dls = digits_dls()
def net():
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
teacher = Learner(dls, net(), metrics=accuracy).to_adversarial()
teacher.fit_one_cycle(1)
learn = rkd_learner(dls, net(), teacher, metrics=[accuracy, RobustAccuracy()])
learn.fit_one_cycle(1)
print(learn.robustness(('clean', 'pgd20')))
learn.export('student.pkl')
print(load_learner('student.pkl').predict(dls.valid_ds[0][0]))
'''

def test_no_warning_in_normal_use(tmp_path):
    "None but fastai's own, of `load_learner`"
    done = subprocess.run([sys.executable, '-W', 'always', '-c', script], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300, env=os.environ | dict(PYTHONPATH=str(Path(__file__).parent.parent)))
    assert not done.returncode, done.stderr
    before, ours = done.stderr.split('--- rkd_fastai')
    warned = [l for l in ours.splitlines() if re.search('[Ww]arning', l)]
    # the teacher has hardly been trained
    warned = [l for l in warned if 'validation images correctly' not in l and 'warn(says)' not in l]
    assert [l for l in warned if 'load_learner` uses' not in l] == [] and len(warned) == 1 and 'pgd20' in done.stdout

# --- TorchScript and lazy layers ---

def scripted(net): return torch.jit.script(net)
def traced(net): return torch.jit.trace(net, torch.rand(2, 1, 8, 8))
def frozen_script(net): return torch.jit.freeze(torch.jit.script(net))

@pytest.mark.filterwarnings('ignore:.*torch.jit')
@pytest.mark.parametrize('make', [scripted, traced, frozen_script])
def test_torchscript(make, robust_net, test_images, make_learner, tmp_path):
    "It is attacked and distilled from as the network it was made of, and is afterwards as it was"
    (x, y), net = (t[:40] for t in test_images), make(copy.deepcopy(robust_net))
    was = [hasattr(m, 'training') and m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    attack = PGD(.1, steps=3, random_start=False)
    assert ((attack(net, x, y) - attack(robust_net, x, y)).abs() < 1e-6).float().mean() > .99
    assert (robust_accuracy(net, x, y, AutoAttack(.1, version='apgd-ce', fast=True))
            == robust_accuracy(robust_net, x, y, AutoAttack(.1, version='apgd-ce')))
    teacher = Teacher(net)
    torch.testing.assert_close(teacher.probs(x), Teacher(robust_net).probs(x))
    assert not any(p.requires_grad for p in teacher.parameters())
    learn = make_learner().to_rkd(teacher, attack=PGD(steps=1))
    learn.fit(1)
    assert was == ([hasattr(m, 'training') and m.training for m in net.modules()],
                   [p.requires_grad for p in net.parameters()])
    with torch.no_grad():
        for p in net.parameters(): p.zero_() # the teacher's are its own
    torch.testing.assert_close(teacher.probs(x), Teacher(robust_net).probs(x))
    net.save(tmp_path/'net.pt')
    with pytest.raises(ValueError, match=r'is a TorchScript file.*`torch.jit.load\(path\)`'):
        load_teacher(tmp_path/'net.pt', robust_net)
    Teacher(torch.jit.load(tmp_path/'net.pt'))

@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_training_torchscript(tiny_net, make_learner, tmp_path):
    learn = make_learner(model=torch.jit.script(tiny_net()),
                         cbs=[WeightAveraging(), NonFinite(), KeepEpochs(),
                              Resume(tmp_path/'r.pth')]).to_adversarial(PGD(steps=1))
    learn.fit(1)
    assert 0 <= learn.robustness('pgd2').pgd2 <= 1

def lazy_net():
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(affine=False), nn.ReLU(), nn.Flatten(),
                         nn.LazyLinear(10))

@pytest.mark.parametrize('how', ['adversarial', 'akd', 'averaging', 'finite', 'resume', 'metric', 'epochs',
                                 'robustness', 'masking', 'teacher', 'export'])
def test_lazy_layers_of_a_learner(how, make_learner, tiny_net, tmp_path):
    "They get their weights from the Learner's images, as in fastai's own `fit`, and the network's modes stay"
    cbs = dict(averaging=WeightAveraging, finite=NonFinite, resume=lambda: Resume(tmp_path/'r.pth'), epochs=KeepEpochs)
    learn = make_learner(model=lazy_net(), cbs=cbs[how]() if how in cbs else None,
                         metrics=RobustAccuracy(PGD(steps=1)) if how == 'metric' else None)
    if how == 'adversarial': learn.to_adversarial(PGD(steps=1))
    if how == 'akd': learn.to_rkd(tiny_net(), attack=PGD(steps=1))
    once = dict(robustness=lambda: learn.robustness('pgd2'), teacher=lambda: Teacher(learn).probs(torch.rand(2,1,8,8)),
                metric=learn.validate, export=lambda: learn.to_robustbench(tmp_path/'export'))
    if how == 'masking':
        with pytest.raises(ValueError, match='need at least 10'): learn.check_robustness() # it is not trained
    else: once.get(how, lambda: learn.fit(1))()
    # fastai's own leave it in eval mode
    assert learn.model.training == (how in ('robustness','masking','teacher','export'))
    assert [type(m) for m in learn.model] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Flatten, nn.Linear]

def test_lazy_layers_elsewhere(tiny_net, tmp_path):
    "Said, with the way out"
    x, y, net = torch.rand(2,1,8,8), torch.zeros(2).long(), lazy_net()
    torch.save(tiny_net().state_dict(), tmp_path/'net.pth')
    for what in (lambda: PGD()(net, x, y), lambda: robust_accuracy(net, x, y),
                 lambda: load_teacher(tmp_path/'net.pth', net), lambda: export_robustbench(net, x, tmp_path/'export')):
        with pytest.raises(ValueError, match=r'`model` has lazy layers without weights '
                                             r'\(LazyBatchNorm2d, LazyConv2d, LazyLinear\): run one batch'):
            what()
    with pytest.raises(ValueError, match='`teacher` has lazy layers'): Teacher([tiny_net(), net])
    net(x)
    assert PGD()(net, x, y).shape == x.shape
