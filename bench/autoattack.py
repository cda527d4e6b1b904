"""AutoAttack, standard: pyautoattack called as its documentation does, `AutoAttack()`, and `AutoAttack(fast=True)`
with and without bfloat16.

    python -m bench.autoattack --n 64 --runs 3
    python -m bench.autoattack --data fashion_mnist --data-path FOLDER --n 1000 --runs 1    # agreement on more images

Trains a robust network first, on the images of the package where no other data are named: what falls early costs no
time.
"""
from unittest.mock import patch
import torch
from fastai.vision.all import Learner, set_seed
from pyautoattack import AutoAttack as Published
from rkd_fastai.attacks import autoattack as attacks
from rkd_fastai.attacks.autoattack import AutoAttack
from rkd_fastai.attacks.pgd import PGD
from rkd_fastai.data.benchmarks import fashion_mnist_dls, fashion_sample_dls
from rkd_fastai.data.images import pixel_data
from rkd_fastai.schedules import sgd_nesterov
from rkd_fastai.models import cifar_resnet18
from rkd_fastai.normalization import pixel_model
from .timing import compare, parse, ratio, setting

EPS = 8/255

def trained(a):
    set_seed(0, reproducible=True)
    kw = dict(device=a.device, device_resident=True)
    dls = fashion_sample_dls(size=28, **kw) if a.data == 'sample' else fashion_mnist_dls(a.data_path, bs=a.bs, **kw)
    learn = Learner(dls, cifar_resnet18(10, a.width, 1), opt_func=sgd_nesterov).to_adversarial(PGD(EPS))
    with learn.no_bar(), learn.no_logging(): learn.fit_rkd(a.epochs)
    return learn

def main(args=None):
    a = parse(__doc__, args, **{'n': dict(type=int, default=64), 'epochs': dict(type=int, default=10),
                                'data-path': dict(default=None),
                                'data': dict(choices=['sample','fashion_mnist'], default='sample')})
    learn = trained(a)
    learn.model.eval()
    model, (x, y) = pixel_model(learn), (t.to(a.device) for t in pixel_data(learn, n=a.n))
    flags = {}
    def keep(name, x_adv):
        with torch.no_grad(): flags[name] = (model(x).argmax(1) == y) & (model(x_adv).argmax(1) == y)
    def published():
        aa = Published(model, norm='Linf', eps=EPS, seed=0, version='standard', device=a.device)
        keep('pyautoattack', aa.run_standard_evaluation(x, y, batch_size=a.bs)[0])
    def ours(name, bf16, **kw):
        with patch.object(attacks, 'has_bf16', lambda device: bf16 and real(device)):
            keep(name, AutoAttack(EPS, seed=0, bs=a.bs, **kw)(model, x, y))
    real = attacks.has_bf16
    contestants = {'pyautoattack': published, 'ours': lambda: ours('ours', True),
                   'fast, float32': lambda: ours('fast, float32', False, fast=True),
                   'fast': lambda: ours('fast', True, fast=True)}
    print(f'AutoAttack on {a.n} images, {setting(a)}; bfloat16 in hardware: {"yes" if real(a.device) else "no"}')
    times = compare(contestants, a.device, a.runs, warmup=0)
    print(f"{'':<16}{'stand':>6}{'differ':>8}{'seconds':>9}   pyautoattack ÷ this")
    for k,ts in times.items():
        differ, median = (flags[k] != flags['pyautoattack']).sum(), sorted(ts)[len(ts)//2]
        print(f"{k:<16}{flags[k].sum():>6}{differ:>8}{median:>9.1f}   {ratio(times['pyautoattack'], ts)}")

if __name__ == '__main__': main()
