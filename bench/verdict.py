"""Does it change the verdict? PGD-20 accuracy of a trained network in float32, compiled, and in bfloat16, on the whole test split.

    python -m bench.verdict --data-path FOLDER

Trains on Fashion-MNIST (found or downloaded where no folder is given), twice: with the attack in float32 and in bfloat16.
"""
import torch
from fastai.vision.all import Learner, set_seed
from rkd_fastai.attacks import PGD
from rkd_fastai.data import fashion_mnist_dls
from rkd_fastai.evaluation import pixel_data, seeded
from rkd_fastai.fast import faster
from rkd_fastai.learner import sgd_nesterov
from rkd_fastai.models import resnet18
from rkd_fastai.pixel import pixel_model
from .timing import parse, setting

def trained(a, bf16):
    set_seed(0, reproducible=True)
    dls = fashion_mnist_dls(a.data_path, bs=a.bs, device=a.device, device_resident=True)
    learn = Learner(dls, resnet18(10, a.width, 1), opt_func=sgd_nesterov).to_adversarial(PGD(), bf16=bf16)
    with learn.no_bar(), learn.no_logging(): learn.fit_rkd(a.epochs)
    return learn

def flags(model, x, y, bs, **how):
    "Which images stand PGD-20, in order; batches of one size, so that all are compiled"
    found = []
    for i,(xb,yb) in enumerate(zip(x.split(bs), y.split(bs))):
        with seeded(i, xb.device), faster(**how): x_adv = PGD(steps=20)(model, xb, yb)
        with torch.no_grad(): found.append(model(x_adv).argmax(1) == yb)
    return torch.cat(found)

def main(args=None):
    a = parse(__doc__, args, **{'epochs': dict(type=int, default=3), 'data-path': dict(default=None)})
    print(setting(a))
    for bf16 in (False, True):
        learn = trained(a, bf16)
        learn.model.eval()
        model, (x, y) = pixel_model(learn), (t.to(a.device) for t in pixel_data(learn))
        exact = flags(model, x, y, a.bs)
        print(f'trained {a.epochs} epochs with the attack in {"bfloat16" if bf16 else "float32"}; PGD-20 accuracy on {len(x)} images: float32 {exact.float().mean():.2%}', end='')
        for name,how in {'compiled': dict(compile=True), 'bfloat16': dict(bf16=True)}.items():
            f = flags(model, x, y, a.bs, **how)
            print(f'; {name} {f.float().mean():.2%} ({(f != exact).sum()} images differ)', end='')
        print()

if __name__ == '__main__': main()
