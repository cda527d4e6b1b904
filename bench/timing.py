"Pairwise timing inside one process: the machine's speed drifts, ratios taken minutes apart would not hold."
import argparse, platform, statistics, time
from importlib.metadata import version
import torch
from torch.utils.flop_counter import FlopCounterMode
from rkd_fastai.study.run import machine

# how ours is run: name and the arguments of `faster`
HOW = {'ours': {}, 'ours, compiled': dict(compile=True), 'ours, bf16': dict(bf16=True),
       'ours, both': dict(compile=True, bf16=True)}

def ways(device):
    "The ways of running ours that differ on `device`"
    return HOW | ({'ours, all': dict(compile=True, bf16=True, cuda_graph=True)} if device.startswith('cuda') else {})

def parse(doc, args=None, **more):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--width', type=float, help='of the ResNet-18; default 1/8 on the CPU, 1 on a GPU')
    p.add_argument('--size', type=int, help='of the images; default 28 on the CPU, 32 on a GPU')
    p.add_argument('--bs', type=int, default=256)
    p.add_argument('--runs', type=int, default=9, help='counted rounds; each runs every contestant once')
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    for k,v in more.items(): p.add_argument(f'--{k}', **v)
    a = p.parse_args(args)
    on_gpu = a.device.startswith('cuda')
    a.width, a.size = a.width or (1. if on_gpu else 1/8), a.size or (32 if on_gpu else 28)
    a.n_in = 1 if a.size == 28 else 3
    torch.set_num_threads(a.threads)
    return a

def setting(a):
    "Network, hardware and versions, in two lines"
    cuda = a.device.startswith('cuda')
    what = machine() + ('' if cuda else f', {torch.get_num_threads()} thread(s)')
    return (f"ResNet-18 width {a.width:g}, {a.size}×{a.size}, batch {a.bs}\n"
            f"{what}; torch {torch.__version__}, fastai {version('fastai')}, Python {platform.python_version()}")

def seconds(fn, device):
    "Seconds that one call of `fn` takes, the device's work included"
    if device.startswith('cuda'): torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    if device.startswith('cuda'): torch.cuda.synchronize()
    return time.perf_counter() - start

def compare(contestants, device, runs, warmup=2):
    "Seconds of each of `runs` rounds, by name; a round runs every contestant once, in turn"
    for _ in range(warmup):
        for fn in contestants.values(): fn()
    times = {k: [] for k in contestants}
    for i in range(runs):
        for k in (list(contestants) if i%2 == 0 else reversed(contestants)):
            times[k].append(seconds(contestants[k], device))
    return times

def ratio(above, below):
    "Median and range of the ratios, round by round"
    rs = sorted(a/b for a,b in zip(above, below))
    return f'{statistics.median(rs):.2f} ({rs[0]:.2f} to {rs[-1]:.2f})'

def table(times, ours, bs):
    "Print each contestant's images/s, and its seconds over those of each of `ours`: median (range)"
    print(f"{'':<26}{'images/s':>9}{'ms':>8}" + ''.join(f"{'÷ '+o:>24}" for o in ours))
    for k,ts in times.items():
        med = statistics.median(ts)
        print(f'{k:<26}{bs/med:>9.0f}{med*1e3:>8.1f}'
              + ''.join(f"{'' if k == o else ratio(ts, times[o]):>24}" for o in ours))

def forward_flops(model, x):
    "Floating-point operations of one forward pass"
    with FlopCounterMode(display=False) as c, torch.no_grad(): model(x)
    return c.get_total_flops()

def matmul_rate(device, n=None):
    "FLOP/s of a bfloat16 matrix product, the best of several"
    n = n or (8192 if device.startswith('cuda') else 2048)
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    for _ in range(3): a@b
    return 2*n**3/min(seconds(lambda: a@b, device) for _ in range(10))

def peak_mib(fn, device):
    "Peak GPU memory of one call of `fn` in MiB"
    torch.cuda.reset_peak_memory_stats(device)
    seconds(fn, device)
    return torch.cuda.max_memory_allocated(device)/2**20
