"Pairwise timing inside one process: the machine's speed drifts, ratios taken minutes apart would not hold."
import argparse, platform, statistics, time
from importlib.metadata import version
import torch

def parser(doc):
    p = argparse.ArgumentParser(description=doc)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--width', type=float, help='of the ResNet-18; default 1/8 on the CPU, 1 on a GPU')
    p.add_argument('--size', type=int, help='of the images; default 28 on the CPU, 32 on a GPU')
    p.add_argument('--bs', type=int, default=256)
    p.add_argument('--runs', type=int, default=9, help='counted rounds; each runs every contestant once')
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    return p

def parse(doc, args=None, **more):
    p = parser(doc)
    for k,v in more.items(): p.add_argument(f'--{k}', **v)
    a = p.parse_args(args)
    on_gpu = a.device.startswith('cuda')
    a.width, a.size = a.width or (1. if on_gpu else 1/8), a.size or (32 if on_gpu else 28)
    torch.set_num_threads(a.threads)
    return a

def machine(device):
    "The hardware and versions, in a line"
    if device.startswith('cuda'): what = torch.cuda.get_device_name()
    else: what = f'{_cpu()}, {torch.get_num_threads()} threads'
    return f"{what}; torch {torch.__version__}, fastai {version('fastai')}, Python {platform.python_version()}"

def _cpu():
    try: return next(l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name'))
    except (OSError, StopIteration): return platform.processor() or platform.machine()

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
        for k in (list(contestants) if i%2 == 0 else reversed(contestants)): times[k].append(seconds(contestants[k], device))
    return times

def table(times, ours, bs):
    "Print each contestant's images/s and its seconds over those of `ours`, round by round: median and range"
    print(f"{'':<28}{'images/s':>10}{'ms':>9}   seconds / seconds of {ours!r}: median (min to max)")
    for k,ts in times.items():
        ratios = sorted(a/b for a,b in zip(ts, times[ours]))
        med = statistics.median(ts)
        print(f'{k:<28}{bs/med:>10.0f}{med*1e3:>9.1f}   {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})')
