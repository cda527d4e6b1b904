"The public names: where they are, what they take, and what importing them costs."
import ast, importlib, inspect, re
from pathlib import Path
import pytest, torch.nn as nn
from conftest import python

root = Path(__file__).parents[2]

def test_pytorch_modules_need_no_fastai():
    assert python('''
        import sys
        class Blocked:
            def find_spec(self, name, *_):
                if name.split('.')[0] in ('fastai', 'fastcore', 'sklearn', 'pandas', 'fastprogress'):
                    raise ImportError(f'{name} is blocked')
        sys.meta_path.insert(0, Blocked())
        from rkd_fastai import core, losses, attacks, models
        import torch
        net = models.cifar_resnet18(width=1/16, n_in=1)
        x_adv = attacks.PGD(steps=1)(net, torch.rand(2, 1, 8, 8), torch.tensor([1, 2]))
        print(losses.akd_loss(net(x_adv), torch.full((2, 10), .1), torch.tensor([1, 2])).ndim)
    ''') == '0'

def shadowed_names(first, second):
    "The names that `second` gives another meaning than `first` gave them"
    ns = {}
    exec(f'from {first} import *', ns); before = dict(ns)
    exec(f'from {second} import *', ns)
    return [k for k,v in before.items() if not k.startswith('__') and ns[k] is not v]

def test_star_import_shadows_nothing_of_fastai(): assert shadowed_names('fastai.vision.all', 'rkd_fastai.all') == []
def test_fastai_shadows_nothing_of_ours(): assert shadowed_names('rkd_fastai.all', 'fastai.vision.all') == []

e = 8/255
no = inspect.Parameter.empty
pgd = object() # stands for a PGD with these defaults
public = { # module: name: argument: default
    'losses': dict(
        soft_targets=dict(t_probs=no, targ=no, alpha=no), ensemble_probs=dict(probs=no, betas=None),
        ckd_loss=dict(s_logits=no, t_probs=no, targ=no, lam=.9, T=1.),
        ard_loss=dict(s_logits=no, s_logits_adv=no, t_probs=no, targ=no, alpha=1., lam=5/6, T=1.),
        rslad_loss=dict(s_logits=no, s_logits_adv=no, t_probs=no, targ=no, alpha=1., lam=5/6, T=1.),
        akd_loss=dict(s_logits_adv=no, t_probs_adv=no, targ=no, alpha=1., T=1.),
        trades_loss=dict(s_logits=no, s_logits_adv=no, targ=no, beta=6.)),
    'attacks': dict(
        PGD=dict(eps=e, steps=7, step_size=None, norm='Linf', random_start=True, restarts=1, objective='ce'),
        FGSM=dict(eps=e), FFGSM=dict(eps=e, step_size=None),
        AutoAttack=dict(eps=e, norm='Linf', version='standard', seed=0, bs=250)),
    'teachers': dict(Teacher=dict(models=no, betas=None, mean=None, std=None), load_teacher=dict(path=no, model=no)),
    'callback': dict(
        AdversarialTraining=dict(attack=pgd), TRADES=dict(attack=pgd, beta=6.),
        AKDCallback=dict(teacher=no, alpha=.8, attack=pgd, T=1.),
        RSLADCallback=dict(teacher=no, alpha=.8, lam=5/6, attack=pgd, T=1.),
        ARDCallback=dict(teacher=no, alpha=.8, lam=5/6, attack=pgd, T=1.), CKDCallback=dict(teacher=no, lam=.9, T=1.),
        WeightAveraging=dict(decay=.995), KeepEpochs=dict(every=1, fname='epoch'),
        RobustAccuracy=dict(attack=pgd, n=None)),
    'learner': dict(rkd_learner=dict(dls=no, arch=no, teacher=no, method='akd', alpha=.8, lam=5/6, attack=None, T=1.)),
    'evaluation.export': dict(
        export_robustbench=dict(model=no, x=no, folder=no, robustness=None, norm='Linf', n_test=None)),
    'evaluation': dict(robust_accuracy=dict(model=no, x=no, targ=no, attack=None, bs=256)),
    'models': dict(cifar_resnet18=dict(n_out=10, width=1., n_in=3),
                   wide_resnet=dict(depth=28, widen=10, n_out=10, act=nn.SiLU, n_in=3)),
    'data': dict(digits_dls=dict(bs=128, valid_pct=.2, seed=42), fashion_sample_dls=dict(bs=125, size=14),
                 fashion_mnist_dls=dict(path=None, bs=256),
                 cifar10_dls=dict(path=None, bs=256), cifar100_dls=dict(path=None, bs=256),
                 tiny_imagenet_dls=dict(path=None, bs=256))}
patched = dict(to_rkd=dict(teacher=no, method='akd'), to_adversarial=dict(attack=None), to_natural={},
               fit_exp=dict(n_epoch=no, lr_max=.1, decay=.9),
               fit_rkd=dict(n_epoch=no, lr_max=.21),
               robustness=dict(attacks=('clean', 'pgd20', 'autoattack'), eps=e, norm='Linf', n=None, seed=0, dl=None,
                               state_path=None),
               to_robustbench=dict(folder=no, robustness=None, norm='Linf'))
pgd_settings = dict(TRADES=dict(steps=10, objective='kl'), RobustAccuracy=dict(steps=20))

def check_signature(name, f, want):
    from rkd_fastai.attacks.pgd import PGD
    params = list(inspect.signature(f).parameters.values())
    params = [p for p in params if p.name != 'self'][:len(want)]
    assert [p.name for p in params] == list(want), 'arguments by name, in this order; further ones come after them'
    for p in params:
        if want[p.name] is pgd:
            assert type(p.default) is PGD and p.default.settings == PGD(**pgd_settings.get(name, {})).settings
        else: assert p.default == want[p.name] and type(p.default) is type(want[p.name])

@pytest.mark.parametrize('module,name', [(m, n) for m,ns in public.items() for n in ns])
def test_public_name(module, name):
    obj = getattr(importlib.import_module(f'rkd_fastai.{module}'), name)
    assert getattr(importlib.import_module('rkd_fastai.all'), name) is obj
    check_signature(name, obj, public[module][name])

@pytest.mark.parametrize('name', ['ckd_loss', 'ard_loss', 'rslad_loss', 'akd_loss', 'trades_loss'])
def test_losses_take_reduction(name):
    from rkd_fastai import losses
    assert inspect.signature(getattr(losses, name)).parameters['reduction'].default == 'mean'

@pytest.mark.parametrize('name', patched)
def test_patched_on_learner(name):
    import rkd_fastai.all # noqa: F401 (patches `Learner`)
    from fastai.learner import Learner
    check_signature(name, getattr(Learner, name), patched[name])

architecture = (root/'docs/architecture.md').read_text(encoding='utf8')

def picture():
    "The layers that docs/architecture.md draws, from top to bottom, and the modules that stand beside each package"
    layers, modules = [[]], {}
    for line in re.search(r'^```\n(.*?)^```', architecture, re.M | re.S)[1].splitlines():
        left, middle = (re.findall(r'\w+', part) for part in (line[:20], line[20:56]))
        if '▼' in line: layers.append([])
        if '└' not in line: layers[-1] += left
        if left: package = f'{layers[-1][-1]}/{left[-1]}' if '└' in line else left[-1]
        if middle: modules.setdefault(package, []).extend(middle)
    return [{*names} for names in layers], modules

def test_the_picture_of_the_architecture_is_that_of_the_contracts():
    """It has each module that they name, on its layer, and inside a package nothing stands before what it imports from;
    a new module inside a package needs no place in either"""
    try: import tomllib
    except ImportError: import tomli as tomllib # Python 3.10
    tool = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf8'))['tool']
    whole, *inside = [[[o.strip() for o in re.split('[:|]', layer)] for layer in c['layers']]
                      for c in tool['importlinter']['contracts'] if c['type'] == 'layers']
    layers, modules = picture()
    assert layers == [{*names} for names in whole]
    for contract in inside:
        package = '/'.join(contract[0][0].split('.')[1:-1])
        height = {name.split('.')[-1]: i for i,names in enumerate(contract) for name in names}
        drawn = modules.pop(package)
        assert {*drawn} == {*height} and drawn == sorted(drawn, key=height.get), package
        folder = root/'rkd_fastai'/package
        assert all((folder/f'{name}.py').exists() or (folder/name/'__init__.py').exists() for name in drawn)
    assert not modules

def test_the_architecture_names_files_that_are_there():
    named = {*re.findall(r'`((?:nbs|rkd_fastai|tests|docs|bench)/[\w./]*)`', architecture)}
    assert len(named) > 30 and [f for f in named if not (root/f).exists()] == []

def test_star_import_brings_the_public_names():
    ns = {}
    exec('from rkd_fastai.all import *', ns)
    import fastai.vision.all as fastai
    for names in public.values():
        for name in names: assert name in ns or hasattr(fastai, name), name
    assert 'resnet18' not in ns # torchvision's, to fastai users
    for name in ('write_atomic', 'digest', 'unwrap', 'own_loss', 'check_xy', 'load_plain'):
        assert name not in ns, 'a helper of one module for another'

def test_teacher_methods():
    from rkd_fastai.teachers import Teacher
    check_signature('probs', Teacher.probs, dict(x=no, T=1.))

def test_rkd_learner_takes_what_vision_learner_takes():
    from fastai.vision.learner import vision_learner
    from rkd_fastai.learner import rkd_learner
    ours = set(inspect.signature(rkd_learner).parameters)
    assert set(inspect.signature(vision_learner).parameters) - {'kwargs'} <= ours

packages = ('all', 'attacks', 'callback', 'data', 'evaluation', 'study')

@pytest.mark.parametrize('name', packages)
def test_a_package_says_what_it_offers(name):
    "Its `__all__` names each thing once, in the order of its imports"
    module = importlib.import_module(f'rkd_fastai.{name}')
    assert len(set(module.__all__)) == len(module.__all__) > 1
    for o in module.__all__: assert hasattr(module, o), o

def test_the_public_names_are_few():
    "A name that is added to `rkd_fastai.all` is one more that a newcomer has to look at"
    from rkd_fastai import all
    assert len(all.__all__) <= 76

def test_default_attacks_are_not_shared():
    "Changing one callback's attack must not change the next one's"
    from rkd_fastai.callback.adversarial import AdversarialTraining, TRADES
    from rkd_fastai.callback.monitor import RobustAccuracy
    for cls in (AdversarialTraining, TRADES, RobustAccuracy):
        a = cls(); a.attack.steps = 99
        assert cls().attack.steps != 99

def described(owner, name, f):
    "What of the function `f`, exported as `name`, has no comment: its own parameters, and itself"
    from fastcore.docments import docments
    comments = docments(f)
    own = [p.name for p in inspect.signature(f, follow_wrapped=False).parameters.values()
           if p.name not in ('self','cls') and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    src = inspect.getsource(f)
    return ([f'{owner}.{name}({p})' for p in own if not comments.get(p) and re.search(rf'\b{p}\b', src.split('):')[0])]
            + ([f'{owner}.{name}'] if not (f.__doc__ or name.endswith('__init__')) else []))

def test_all_that_is_exported_is_described():
    """Every function and every constructor in `__all__` has a docstring, and each of its parameters a comment: the
    reference shows them"""
    import pkgutil, rkd_fastai
    missing = []
    for info in pkgutil.walk_packages(rkd_fastai.__path__, 'rkd_fastai.'):
        module = importlib.import_module(info.name)
        for name in getattr(module, '__all__', []):
            o = getattr(module, name)
            if getattr(o, '__module__', None) != info.name: continue
            if inspect.isfunction(o): missing += described(info.name, name, o)
            elif inspect.isclass(o):
                if not o.__doc__: missing.append(f'{info.name}.{name}')
                if '__init__' in vars(o) and not hasattr(o, '__dataclass_fields__'):
                    missing += described(info.name, f'{name}.__init__', o.__init__)
    assert missing == []

def test_names_are_imported_from_where_they_are_made():
    "and not from a module that imports them itself"
    for f in [f for f in (root/'rkd_fastai').rglob('*.py') if f.name not in ('all.py', '__init__.py', '_modidx.py')]:
        for node in [n for n in ast.walk(ast.parse(f.read_text(encoding='utf8'))) if isinstance(n, ast.ImportFrom)
                     and n.level and n.module]:
            source = f.parents[node.level-1]/f'{node.module.replace(".", "/")}.py'
            if not source.exists(): continue
            lent = {a.asname or a.name for n in ast.walk(ast.parse(source.read_text(encoding='utf8')))
                    if isinstance(n, ast.ImportFrom) for a in n.names}
            taken = lent & {a.name for a in node.names}
            assert not taken, f'{f.name} takes {taken} from {source.name}'

def unused(source):
    "Names that `source` imports and never mentions, but in lines marked `noqa`"
    lines,tree = source.splitlines(), ast.parse(source)
    brought = {(a.asname or a.name).split('.')[0] for n in ast.walk(tree)
               if isinstance(n, (ast.Import, ast.ImportFrom)) and 'noqa' not in lines[n.lineno-1] for a in n.names}
    return brought - {'*'} - {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - {
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}

@pytest.mark.parametrize('folder', ['rkd_fastai', 'tests', 'tools', 'bench', 'examples'])
def test_no_import_is_left_over(folder):
    assert unused('import os, sys as s\nfrom a.b import c, d\nimport x # noqa: patches\nprint(s, c)') == {'os', 'd'}
    files = [*(root/folder).rglob('*.py')]
    assert files and {f.name: u for f in files if (u := unused(f.read_text(encoding='utf8')))} == {}
