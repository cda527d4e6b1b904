"""One training step of AKD⁺ with PGD-7: ours, the loop of the published scripts, and the floor of 18 bare forward passes.

    python -m bench.step
    python -m bench.step --teachers 4

A step is 18 forward passes' worth of work: 7 × (forward + input gradient) + the teacher's forward + forward and
backward of training, the backward counted as two.
"""
import torch, torch.nn.functional as F
from rkd_fastai.attacks import PGD
from rkd_fastai.losses import akd_loss
from rkd_fastai.models import resnet18
from rkd_fastai.teachers import Teacher
from .attack import EPS, STEP, STEPS, reference_pgd
from .timing import compare, machine, parse, seconds, table

ALPHA = .8

def make(a):
    "A worn-in student, `a.teachers` teachers, a batch"
    torch.manual_seed(0)
    n_in = 1 if a.size == 28 else 3
    nets = [resnet18(10, a.width, n_in).to(a.device) for _ in range(1 + a.teachers)]
    x, y = torch.rand(a.bs, n_in, a.size, a.size, device=a.device), torch.randint(0, 10, (a.bs,), device=a.device)
    with torch.no_grad():
        for net in nets:
            for _ in range(3): net(x)
    return nets[0], nets[1:], x, y

def sgd(model): return torch.optim.SGD(model.parameters(), .1, momentum=.9, nesterov=True, weight_decay=5e-4)

def reference_step(model, teachers, opt, x, y):
    "As the RSLAD authors' script goes about it, with the loss of Eq. 7: eager float32, nothing shared, nothing folded"
    for t in teachers: t.eval()
    x_adv = reference_pgd(model, x, y)
    model.train()
    with torch.no_grad(): probs = sum(F.softmax(t(x_adv), dim=1) for t in teachers)/len(teachers)
    opt.zero_grad()
    target = ALPHA*probs + (1-ALPHA)*F.one_hot(y, probs.shape[1])
    loss = -(target*F.log_softmax(model(x_adv), dim=1)).sum(1).mean()
    loss.backward()
    opt.step()

def bare_step(model, teacher, opt, x, y, attack):
    "Our pieces in a bare loop: what `AKDCallback` does in a batch"
    model.train()
    x_adv = attack(model, x, y)
    probs = teacher.probs(x_adv)
    loss = akd_loss(model(x_adv), probs, y, ALPHA)
    loss.backward()
    opt.step()
    opt.zero_grad()

def main(args=None):
    a = parse(__doc__, args, teachers=dict(type=int, default=1, help='in the ensemble'))
    model, teachers, x, y = make(a)
    opt, attack = sgd(model), PGD(EPS, steps=STEPS, step_size=STEP)
    n = 2*STEPS + a.teachers + 3
    contestants = {'ours': lambda: bare_step(model, ensemble, opt, x, y, attack),
                   'plain reference loop': lambda: reference_step(model, teachers, opt, x, y)}
    ensemble = Teacher(teachers)
    if a.teachers > 1:
        one = Teacher(teachers[0])
        contestants['ours, one teacher'] = lambda: bare_step(model, one, opt, x, y, attack)
    def floor():
        model.eval()
        with torch.no_grad():
            for _ in range(n): model(x)
    contestants[f'floor: {n} forward passes'] = floor
    print(f'AKD⁺ with PGD-{STEPS}, ResNet-18 width {a.width:g}, {a.size}×{a.size}, batch {a.bs}, {a.teachers} teacher(s)\n{machine(a.device)}')
    table(compare(contestants, a.device, a.runs), 'ours', a.bs)
    for k in ('ours','plain reference loop'):
        if a.device.startswith('cuda'):
            torch.cuda.reset_peak_memory_stats(); seconds(contestants[k], a.device)
            print(f'peak memory, {k}: {torch.cuda.max_memory_allocated()/2**20:.0f} MiB')

if __name__ == '__main__': main()
