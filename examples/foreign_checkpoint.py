"""Is a network that somebody else trained robust? The CIFAR-10 checkpoint that pyautoattack ships, on the 20 images
that foolbox ships; no download.

    pip install foolbox pyautoattack
    python examples/foreign_checkpoint.py
"""
from importlib.util import find_spec
from pathlib import Path
import numpy as np, torch
from PIL import Image
from rkd_fastai.evaluation.robustness import measure_robustness
from rkd_fastai.models import cifar_resnet18
from rkd_fastai.teachers import load_teacher

def folder_of(package): return Path(find_spec(package).origin).parent

def cifar_images():
    "Images in [0, 1] `(20, 3, 32, 32)` and their classes, which the files are named by"
    files = sorted((folder_of('foolbox')/'data').glob('cifar10_*.png'))
    imgs = np.stack([np.array(Image.open(f).convert('RGB')) for f in files])
    return torch.tensor(imgs).permute(0, 3, 1, 2).float()/255, torch.tensor([int(f.stem.split('_')[-1]) for f in files])

def main():
    # it takes pixels as they are
    model = load_teacher(folder_of('pyautoattack')/'examples'/'model_test.pt', cifar_resnet18())
    res = measure_robustness(model, *cifar_images(), ('clean', 'pgd20', 'autoattack'), eps=8/255)
    print(res)
    return res

if __name__ == '__main__': main()
