"""A data set in memory: fastai's own loader against one that stays on the device, crop and flip included.

    python -m bench.loader
"""
import numpy as np
from rkd_fastai.data.transforms import PadCropFlip
from rkd_fastai.data.arrays import arrays_dls
from .timing import compare, parse, setting, table

N = 16 # batches in an epoch

def main(args=None):
    a = parse(__doc__, args)
    rng, n = np.random.default_rng(0), N*a.bs
    x = rng.integers(0, 256, (n, a.size, a.size) + (() if a.n_in == 1 else (3,)), dtype=np.uint8)
    xy = x, rng.integers(0, 10, n)
    def epoch(resident):
        dl = arrays_dls(xy, (x[:10], xy[1][:10]), vocab=range(10), bs=a.bs, batch_tfms=PadCropFlip(2), device=a.device,
                        device_resident=resident).train
        def run():
            for _ in dl: pass
        return run
    contestants = {'device_resident=True': epoch(True), "fastai's loader": epoch(False)}
    print(f'{N} batches, {setting(a)}')
    table(compare(contestants, a.device, a.runs), ['device_resident=True'], n)

if __name__ == '__main__': main()
