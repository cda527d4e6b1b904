"""PGD-7 alone: ours, a plain loop, torchattacks, foolbox, and the floor of 14 bare forward passes.

    python -m bench.attack
"""
import torch, torch.nn.functional as F
from rkd_fastai.attacks.pgd import PGD
from rkd_fastai.speed import faster
from rkd_fastai.models import cifar_resnet18
from .timing import compare, parse, setting, table, ways

EPS, STEP, STEPS = 8/255, 2/255, 7

def reference_pgd(model, x, y):
    "PGD as published training scripts write it: eager float32, the parameters requiring gradients"
    model.eval()
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(STEPS):
        x_adv.requires_grad_()
        with torch.enable_grad(): loss = F.cross_entropy(model(x_adv), y, reduction='sum')
        grad = torch.autograd.grad(loss, [x_adv])[0]
        x_adv = x_adv.detach() + STEP*torch.sign(grad.detach())
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    return x_adv.detach()

def network_with_statistics(a):
    "A network whose BatchNorm has seen images"
    model = cifar_resnet18(10, a.width, a.n_in).to(a.device)
    with torch.no_grad():
        for _ in range(3): model(torch.rand(a.bs, a.n_in, a.size, a.size, device=a.device))
    return model

def batch(a):
    return torch.rand(a.bs, a.n_in, a.size, a.size, device=a.device), torch.randint(0, 10, (a.bs,), device=a.device)

def main(args=None):
    a = parse(__doc__, args)
    torch.manual_seed(0)
    model, (x, y), attack = network_with_statistics(a).eval(), batch(a), PGD(EPS, steps=STEPS, step_size=STEP)
    def ours(how):
        with faster(**how): attack(model, x, y)
    contestants = ({k: lambda how=how: ours(how) for k,how in ways(a.device).items()}
                   | {'plain loop': lambda: reference_pgd(model, x, y)})
    try:
        import torchattacks
        ta = torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=STEPS)
        contestants['torchattacks'] = lambda: ta(x, y)
    except ImportError: print('torchattacks is not installed: left out')
    try:
        import foolbox
        fb = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS)
        fmodel = foolbox.PyTorchModel(model, bounds=(0, 1), device=a.device)
        contestants['foolbox'] = lambda: fb(fmodel, x, y, epsilons=EPS)
    except ImportError: print('foolbox is not installed: left out')
    def floor():
        with torch.no_grad():
            for _ in range(2*STEPS): model(x)
    contestants[f'floor, {2*STEPS} forward passes'] = floor

    print(f'PGD-{STEPS}, {setting(a)}')
    table(compare(contestants, a.device, a.runs), list(ways(a.device)), a.bs)

if __name__ == '__main__': main()
