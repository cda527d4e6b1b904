"""Does it change the verdict? PGD-20 accuracy of trained networks in float32, compiled, and in bfloat16, on the whole
test split.

    python -m bench.verdict --data-path FOLDER                            # Fashion-MNIST, found or downloaded where no
    folder is given
    python -m bench.verdict --data sample --epochs 30 --seeds 6           # the 1,000 images of the package, several
    networks

Trains each network twice from the same seed: with the attack in float32 and in bfloat16.
"""
import statistics
import torch
from fastai.vision.all import Learner, set_seed
from rkd_fastai.attacks.pgd import PGD
from rkd_fastai.data.benchmarks import fashion_mnist_dls, fashion_sample_dls
from rkd_fastai.data.images import pixel_data
from rkd_fastai.core import seeded
from rkd_fastai.speed import faster
from rkd_fastai.schedules import sgd_nesterov
from rkd_fastai.models import cifar_resnet18
from rkd_fastai.normalization import pixel_model
from .timing import parse, setting

def trained(a, bf16, seed):
    set_seed(seed, reproducible=True)
    kw = dict(device=a.device, device_resident=True)
    dls = fashion_sample_dls(**kw) if a.data == 'sample' else fashion_mnist_dls(a.data_path, bs=a.bs, **kw)
    learn = Learner(dls, cifar_resnet18(10, a.width, 1), opt_func=sgd_nesterov).to_adversarial(PGD(), bf16=bf16)
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
    a = parse(__doc__, args, **{'epochs': dict(type=int, default=3), 'seeds': dict(type=int, default=1),
                                'data-path': dict(default=None),
                                'data': dict(choices=['fashion_mnist','sample'], default='fashion_mnist')})
    print(setting(a).replace(f'{a.size}×{a.size}, batch {a.bs}', a.data))
    accs = {}
    for seed in range(a.seeds):
        for kind in ('float32','bfloat16'):
            learn = trained(a, kind == 'bfloat16', seed)
            learn.model.eval()
            model, (x, y) = pixel_model(learn), (t.to(a.device) for t in pixel_data(learn))
            exact = flags(model, x, y, a.bs)
            accs.setdefault(kind, []).append(exact.float().mean().item())
            line = (f'seed {seed}, {a.epochs} epochs with the attack in {kind}: PGD-20 accuracy on {len(x)} images '
                    f'{accs[kind][-1]:.2%}')
            for name,how in {'compiled': dict(compile=True), 'in bfloat16': dict(bf16=True)}.items():
                f = flags(model, x, y, a.bs, **how)
                line += f'; {name} {f.float().mean():.2%} ({(f != exact).sum()} differ)'
            print(line, flush=True)
    if a.seeds > 1:
        for kind,v in accs.items():
            print(f'trained in {kind}: {statistics.mean(v):.2%} ± {statistics.stdev(v):.2%}, n = {a.seeds}')
        d = [b-f for f,b in zip(*accs.values())]
        print(f'bfloat16 − float32, pair by pair: {100*statistics.mean(d):+.2f} ± '
              f'{100*statistics.stdev(d)/len(d)**.5:.2f} points (standard error)')

if __name__ == '__main__': main()
