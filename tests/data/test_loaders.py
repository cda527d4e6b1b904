"""DataLoaders made from DataLoaders: every batch has its share of synthetic images, nothing of the first ones
changes, no bad file gets in."""
import copy, pickle, random, struct, tracemalloc, zipfile
from collections import Counter

import numpy as np, pytest, torch
from fastai.callback.data import PartialDL, WeightedDL
from fastai.distributed import DistributedDL
from fastai.vision.all import (CategoryBlock, CutMix, DataBlock, DataLoaders, Image, ImageBlock, ImageDataLoaders,
                               MultiCategoryBlock, Normalize, PILImage, PILImageBW, RandomResizedCrop,
                               RegressionBlock, Resize, TensorCategory, TensorImage, TensorImageBW, TfmdDL,
                               Transform, load_learner, set_seed)

from rkd_fastai.all import *
from rkd_fastai.data.arrays import ResidentDL
from rkd_fastai.data.loaders import *
from rkd_fastai.data.loaders import MixedDL, ResidentMixedDL, with_batch_tfms

# --- images that say who they are: pixels (0,0) to (0,2) of the first channel are kind and number, the label follows
# from them ---

def label_of(kind, i): return (i*7 + kind*3) % 10
def coded(n, kind, shape=(8, 8)):
    x = np.random.default_rng(kind).integers(0, 256, (n, *shape), dtype=np.uint8)
    i = np.arange(n)
    for j,v in enumerate((255*kind, i//256, i % 256)): x[(slice(None), 0, j) + (0,)*(len(shape)-2)] = v
    return x, label_of(kind, i)

def make(n=100, bs=20, shape=(8, 8), **kw):
    return arrays_dls(coded(n, 0, shape), coded(30, 0, shape), coded(20, 0, shape), vocab=list(range(10)), bs=bs, **kw)
def read(x):
    "(is synthetic, number) of each image of a batch"
    px = (x.as_subclass(torch.Tensor).float()*255).round().long()[:,0,0]
    return list(zip((px[:,0] == 255).tolist(), (px[:,1]*256 + px[:,2]).tolist()))
def epoch(dl): return [read(x) for x,_ in dl]
def n_syn(batch): return sum(s for s,_ in batch)
def flat(batches): return [o for b in batches for o in b]
def check_pairs(dl, real, synthetic):
    "Every image is one of those given, pixel by pixel, with its own label"
    for x,y in dl:
        for img,label,(syn,i) in zip((x.as_subclass(torch.Tensor)*255).round().byte(), y, read(x)):
            want = torch.tensor((synthetic if syn else real)[0][i])
            assert (torch.equal(img, want[None] if want.ndim == 2 else want.permute(2,0,1))
                    and label == label_of(int(syn), i))

both = pytest.mark.parametrize('resident', [False, True], ids=['', 'resident'])
SYN = coded(300, 1)


# --- the share ---

@both
@pytest.mark.parametrize('n,bs,frac', [(100, 20, .7), (96, 32, .7), (100, 7, .7), (50, 10, .25), (64, 16, .3),
                                       (45, 9, 1/3), (33, 11, .9), (40, 2, .5), (60, 20, .05), (60, 20, .95)])
def test_share_of_every_batch(resident, n, bs, frac):
    dls = make(n, bs, device_resident=resident)
    mixed = with_synthetic(dls, SYN, frac)
    for _ in range(2):
        got = epoch(mixed.train)
        assert (len(got) == len(mixed.train) == len(dls.train)
                and [len(b) for b in got] == [len(b) for b in epoch(dls.train)])
        assert {n_syn(b) for b in got} == {round(frac*bs)}
        real = Counter(i for s,i in flat(got) if not s)
        assert max(real.values()) == 1 and all(i < n for i in real)

@pytest.mark.parametrize('shuffle', [True, False])
@pytest.mark.parametrize('n,bs,frac', [(100, 20, .7), (95, 7, .7), (64, 16, .3), (50, 9, .15)])
def test_any_bs_indices_in_a_row(n, bs, frac, shuffle):
    "So several processes may cut the epoch wherever they like"
    dl = with_synthetic(make(n, bs), SYN, frac).train
    dl.shuffle = shuffle
    idxs = list(dl.get_idxs())
    assert len(idxs) == n and {sum(j >= n for j in idxs[i:i+bs]) for i in range(n-bs+1)} == {round(frac*bs)}

class OneOf(DistributedDL):
    "One of several processes, which all have drawn the same"
    def __init__(self, dl, rank, world_size): super().__init__(dl, rank, world_size); self.rng = random.Random(3)
    def _broadcast(self, t, rank): return t
    def _to_detach(self, b, cpu=True, gather=True): return b
    def randomize(self): self.dl.rng = random.Random(5)

@both
@pytest.mark.parametrize('n,bs,world', [(96, 8, 2), (90, 10, 3), (100, 16, 3), (101, 10, 4)])
def test_distributed(resident, n, bs, world):
    mixed = with_synthetic(make(n, bs, device_resident=resident), SYN, .7)
    parts = [epoch(OneOf(mixed.train, r, world)) for r in range(world)]
    whole = [b for p in parts for b in p if len(b) == bs]
    padded = -n % world # images that the last process sees again; they may take one batch off its share
    assert len(whole) >= n//bs - world and sum(n_syn(b) != round(.7*bs) for b in whole) <= (padded > 0)
    if not padded: assert max(Counter(i for s,i in flat(whole) if not s).values()) == 1

@both
def test_last_short_batch_keeps_the_share(resident):
    dl = with_synthetic(make(70, 20, device_resident=resident), SYN, .7).train.new(drop_last=False)
    got = epoch(dl)
    assert [len(b) for b in got] == [20, 20, 20, 10] and [n_syn(b) for b in got] == [14, 14, 14, 7]

@both
@pytest.mark.parametrize('n_synthetic', [1, 3, 13, 70, 71])
def test_few_synthetic_images_are_drawn_evenly(resident, n_synthetic):
    got = Counter(i for s,i in flat(epoch(with_synthetic(make(100, 20, device_resident=resident),
                                                         coded(n_synthetic, 1), .7).train)) if s)
    assert (sum(got.values()) == 70 and max(got.values()) - min(got.get(i, 0) for i in range(n_synthetic)) <= 1
            and all(i < n_synthetic for i in got))

def test_every_epoch_draws_anew():
    dl = with_synthetic(make(), SYN).train
    a, b = (flat(epoch(dl)) for _ in range(2))
    assert set(a) != set(b) and a != b
    seen = {i for _ in range(20) for s,i in flat(epoch(dl)) if s}
    assert len(seen) > 280 # of 300, at 70 an epoch
    assert len({i for _ in range(12) for s,i in flat(epoch(dl)) if not s}) > 95

def test_shuffle_false():
    "The same order every time"
    dl = with_synthetic(make(), SYN).train.new(shuffle=False)
    a, b = (flat(epoch(dl)) for _ in range(2))
    assert a == b and [i for s,i in a if not s] == list(range(30)) and [i for s,i in a if s] == list(range(70))


# --- the images ---

@both
@pytest.mark.parametrize('shape', [(8, 8), (8, 6), (8, 8, 3)])
def test_images_and_labels_belong_together(resident, shape):
    syn = coded(300, 1, shape)
    mixed = with_synthetic(make(300, 20, shape, device_resident=resident), syn, .6)
    assert type(mixed.train) is (ResidentMixedDL if resident else MixedDL)
    for _ in range(2): check_pairs(mixed.train, coded(300, 0, shape), syn)
    x, y = mixed.one_batch()
    assert (type(x) is (TensorImageBW if len(shape) == 2 else TensorImage) and x.dtype == torch.float32
            and 0 <= x.min() and x.max() == 1)
    assert type(y) is TensorCategory and y.dtype == torch.int64

def test_resident_or_not():
    found = []
    for resident in (False, True):
        set_seed(1)
        mixed = with_synthetic(make(device_resident=resident, batch_tfms=PadCropFlip(2)), SYN)
        found.append([t for _ in range(2) for b in mixed.train for t in b])
    assert len(found[0]) == 20 and all(type(a) is type(b) and torch.equal(a, b) for a,b in zip(*found))

def test_reproducible_with_a_seed():
    def twice(seed):
        set_seed(seed)
        mixed = with_synthetic(make(), SYN)
        return [epoch(mixed.train) for _ in range(2)]
    assert twice(3) == twice(3) != twice(4)

def test_num_workers():
    "Workers load the very batches"
    found = []
    for n in (0, 2):
        set_seed(2); found.append([(x, y) for x,y in with_synthetic(make(60, num_workers=n), SYN).train])
    assert len(found[0]) == 3 and all(torch.equal(a, b) for p,q in zip(*found) for a,b in zip(p, q))
    assert {n_syn(read(x)) for x,_ in found[1]} == {14}

class Mark(Transform):
    "Sets the last pixel of all images of a training batch"
    split_idx = 0
    def __init__(self, v, order=0): super().__init__(); self.v,self.order = v,order
    def encodes(self, x: TensorImage): x = x.clone(); x[...,-1,-1] = self.v; return x

@both
def test_transforms_reach_synthetic_images(resident):
    "Augmentation before and after, and the normalisation, of which there is one"
    dls = make(batch_tfms=Mark(255), device_resident=resident)
    dls.add_tfms([Normalize.from_stats([.5], [.25], cuda=False)], 'after_batch')
    mixed = with_batch_tfms(with_synthetic(dls, SYN), Mark(0, order=5))
    for x,_ in mixed.train:
        x = x.as_subclass(torch.Tensor)
        assert torch.equal(x[...,-1,-1], torch.full_like(x[...,-1,-1], -2.)) and n_syn(read(x*.25 + .5)) == 14
    assert all(not (x[...,-1,-1] == -2.).all() for x,_ in mixed.valid)
    assert len([o for o in mixed.train.after_batch.fs if isinstance(o, Normalize)]) == 1

@pytest.fixture(params=[True, False], ids=['rgb', 'grey'])
def pil(request, tmp_path):
    "Image files in a DataBlock, and synthetic images for it"
    rgb = request.param
    shape = (12, 12, 3) if rgb else (12, 12)
    x, y = coded(40, 0, shape)
    for img,i in zip(x, range(40)): Image.fromarray(img).save(tmp_path/f'{i}_{y[i]}.png')
    dls = DataBlock((ImageBlock(PILImage if rgb else PILImageBW), CategoryBlock(vocab=[str(i) for i in range(10)])),
                    get_items=lambda p: sorted(p.glob('*.png')),
                    get_y=lambda p: p.stem.split('_')[1], splitter=lambda items: (list(range(30)), list(range(30, 40))),
                    item_tfms=Resize(8, 'squish')).dataloaders(tmp_path, path=tmp_path, bs=10, num_workers=0)
    return dls, coded(60, 1, shape), rgb

def test_pil_images(pil):
    "Of another size, too: item transforms come first; a resized image is that of PIL"
    dls, (x, y), rgb = pil
    mixed = with_synthetic(dls, (x, y), .6)
    resized = torch.stack([torch.tensor(np.asarray(Image.fromarray(i).resize((8, 8), Image.BILINEAR))).reshape(8, 8, -1)
                           .permute(2,0,1) for i in x])
    labels = {i.numpy().tobytes(): int(l) for i,l in zip(resized, y)}
    for xb,yb in mixed.train:
        assert xb.shape == (10, 3 if rgb else 1, 8, 8) and type(xb) is (TensorImage if rgb else TensorImageBW)
        got = [(i.numpy().tobytes(), int(l)) for i,l in zip((xb.as_subclass(torch.Tensor)*255).round().byte(), yb)]
        assert sum(i in labels for i,_ in got) == 6 and all(labels.get(i, l) == l for i,l in got)
    mixed.show_batch(max_n=4)
    import matplotlib.pyplot as plt; plt.close('all')
    with pytest.raises(ValueError, match='channels'):
        with_synthetic(dls, coded(60, 1, (12, 12) if rgb else (12, 12, 3)), .6)


# --- what stays as it was ---

@both
def test_dls_given_stay(resident):
    dls = make(device_resident=resident)
    def look():
        return ([type(dl) for dl in dls.loaders], [dl.bs for dl in dls.loaders],
                [[type(f) for f in dl.after_batch.fs] for dl in dls.loaders], [len(dl.dataset) for dl in dls.loaders])
    before = look()
    made = [with_synthetic(dls, SYN), with_subset(dls, 40), with_bs(dls, 5), with_batch_tfms(dls, Mark(0)),
            with_batch_tfms(with_synthetic(with_subset(dls, 40), SYN), Mark(0))]
    for o in made: list(o.train); list(o.valid)
    assert look() == before and n_syn(flat(epoch(dls.train))) == 0 and len(flat(epoch(dls.train))) == 100
    for o in made:
        assert (len(o.loaders) == 3 and o.path == dls.path and list(o.vocab) == list(dls.vocab) and o.c == 10
                and o.device == dls.device)
        assert o.valid.dataset is dls.valid.dataset and o[2].dataset is dls[2].dataset
        assert all(torch.equal(p, q) for p,q in zip(*(
            torch.cat([x for x,_ in d.valid.new(drop_last=False)]) for d in (o, dls))))

def test_one_normalisation_each():
    """As `vision_learner` adds it, which looks at the training loader and then adds it to all: two Learners on parts
    of the same images"""
    dls = make()
    parts = [with_subset(dls, 40), with_subset(dls, 60), with_synthetic(dls, SYN), with_batch_tfms(dls, Mark(0)),
             with_bs(dls, 5)]
    for o in parts: o.add_tfms([Normalize.from_stats([.5], [.25], cuda=False)], 'after_batch')
    for o in parts: assert [sum(isinstance(f, Normalize) for f in dl.after_batch.fs) for dl in o.loaders] == [1, 1, 1]
    assert [sum(isinstance(f, Normalize) for f in dl.after_batch.fs) for dl in dls.loaders] == [0, 0, 0]

@both
def test_new_loaders_keep_the_share(resident):
    mixed = with_synthetic(make(device_resident=resident), SYN, .3)
    for dl in (mixed.train.new(), mixed.train.new(bs=10).new(bs=20), with_bs(with_bs(mixed, 10), 20).train,
               with_batch_tfms(mixed, Mark(0)).train, copy.deepcopy(mixed.train)):
        assert {n_syn(b) for b in epoch(dl)} == {6} and len(dl) == 5
    assert {n_syn(b) for b in epoch(with_bs(mixed, 10).train)} == {3}
    # other items, of which none are synthetic
    assert sorted(flat(epoch(mixed.train.new(mixed.train_ds.real)))) == [(False, i) for i in range(100)]

def test_pickling():
    mixed = with_synthetic(with_subset(make(), 80), SYN)
    again = pickle.loads(pickle.dumps(mixed))
    assert (len(epoch(again.train)) == 4 and {n_syn(b) for b in epoch(again.train)} == {14}
            and again.train.dataset.n_items == 380)

# --- subsets and batch sizes ---

@both
def test_subset(resident):
    dls = make(200, device_resident=resident)
    few = with_subset(dls, 60)
    got = flat(epoch(few.train))
    assert len(got) == len(set(got)) == 60 == len(few.train_ds) and len(few.train) == 3
    check_pairs(few.train, coded(200, 0), None)
    choice = lambda **kw: {i for _,i in flat(epoch(with_subset(dls, 60, **kw).train))}
    assert choice() == choice(seed=42) == {i for _,i in got} != choice(seed=1)
    assert {i for _,i in flat(epoch(with_subset(dls, 200).train))} == set(range(200))
    nested = with_subset(few, 40)
    assert {i for _,i in flat(epoch(nested.train))} < {i for _,i in got}

def test_subset_of_mixed_is_refused():
    "It would be a subset without the synthetic images; the other way round there is one with them"
    dls = make()
    with pytest.raises(ValueError, match='call `with_subset` before'): with_subset(with_synthetic(dls, SYN), 50)
    mixed = with_synthetic(with_subset(dls, 40), SYN)
    assert [n_syn(b) for b in epoch(mixed.train)] == [14, 14]
    check_pairs(mixed.train, coded(100, 0), SYN)

def test_cache_with_synthetic_images(tiny_net, make_learner):
    "It holds all of them, and there are more than an epoch has"
    dls = with_synthetic(make(40, 20), SYN, .5)
    learn = make_learner(dls, tiny_net(), cbs=RSLADCallback(tiny_net(seed=7), attack=PGD(.1, steps=1), cache=True))
    learn.fit(4)

def test_bad_numbers():
    dls = make()
    for n in (0, -1, 101):
        with pytest.raises(ValueError, match='`n` must be'): with_subset(dls, n)
    for n in (0, -1):
        with pytest.raises(ValueError, match='`n_valid` must be'): with_subset(dls, 50, n_valid=n)
    with pytest.raises(ValueError, match='smaller batch size'): with_subset(dls, 19)
    for bs in (0, -1, 101):
        with pytest.raises(ValueError, match='`bs`'): with_bs(dls, bs)
    assert len(with_bs(dls, 100).train) == 1
    for frac in (0, 1, -.1, 7, float('nan')):
        with pytest.raises(ValueError, match='`frac`'): with_synthetic(dls, SYN, frac)
    for frac in (.01, .99):
        with pytest.raises(ValueError, match='would have no (real|synthetic) image'): with_synthetic(dls, SYN, frac)
    mixed = with_synthetic(dls, SYN)
    with pytest.raises(ValueError, match='would have no real image'): with_bs(mixed, 1)
    with pytest.raises(TypeError, match='must be a plain `TfmdDL`'): with_synthetic(mixed, SYN)

def test_batch_tfms_in_their_place():
    "After what is there already where `order` is the same: a square is cut out of the crop, not cropped"
    dls = make(batch_tfms=PadCropFlip(2))
    assert ([type(f).__name__ for f in with_batch_tfms(dls, Cutout(3)).train.after_batch.fs]
            == ['PadCropFlip', 'Cutout', 'IntToFloatTensor'])


# --- in a Learner ---

@both
def test_fit(resident, make_learner, tiny_net):
    mixed = with_synthetic(make(device_resident=resident), SYN)
    learn = make_learner(mixed, cbs=[AdversarialTraining(PGD(.1, steps=1)), CutMix(1.)])
    before = copy.deepcopy(learn.model.state_dict())
    learn.fit(2, .01)
    assert (any(not torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
            and len(learn.recorder.values) == 2)
    preds, y = learn.get_preds()
    assert len(preds) == 30 and torch.equal(y.as_subclass(torch.Tensor), torch.tensor(coded(30, 0)[1]))
    learn.fine_tune(1)

@pytest.mark.filterwarnings('ignore:.*numpy.core is deprecated')
@both
def test_lr_find(resident, make_learner):
    learn = make_learner(with_synthetic(make(device_resident=resident), SYN))
    learn.lr_find(show_plot=False, num_it=8)
    assert len(learn.recorder.losses) == 8

@pytest.mark.filterwarnings('ignore:.*load_learner')
@both
def test_export_and_predict(resident, make_learner, tmp_path):
    "No images in the file; it predicts as before"
    sizes = []
    for name,dls in (('plain', make(device_resident=resident)),
                     ('mixed', with_synthetic(with_subset(make(device_resident=resident), 60), SYN))):
        learn = make_learner(dls); learn.fit(1); learn.export(f'{name}.pkl')
        sizes.append((tmp_path/f'{name}.pkl').stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 5_000
    again, img = load_learner(tmp_path/'mixed.pkl'), SYN[0][5]
    with again.no_bar(), learn.no_bar():
        torch.testing.assert_close(again.predict(img)[2], learn.predict(img)[2])
        assert learn.predict(learn.dls.train_ds[0][0])[0] in map(str, range(10))
    dl = learn.dls.test_dl([img]*3)
    assert len(learn.get_preds(dl=dl)[0]) == 3
    learn.dls.show_batch(max_n=4)
    import matplotlib.pyplot as plt; plt.close('all')


# --- files ---

def npz(path, how=np.savez, **arrays):
    how(path, **arrays)
    return path

@pytest.mark.parametrize('how', [np.savez, np.savez_compressed])
@pytest.mark.parametrize('shape', [(8, 8), (8, 8, 1), (8, 8, 3)])
@pytest.mark.parametrize('order', 'CF')
@pytest.mark.parametrize('dtype', ['i8', 'u1', '>i4', 'u8'])
def test_files_that_are_read(how, shape, order, dtype, tmp_path):
    x, y = coded(50, 1, shape)
    path = npz(tmp_path/'a.npz', how, image=np.asarray(x, order=order), label=y.astype(dtype), other=np.array(['text']))
    gx, gy = read_synthetic(path)
    assert (gx.dtype == np.uint8 and np.array_equal(gx, x[...,0] if shape[2:] == (1,) else x)
            and gy.tolist() == y.tolist())
    dls = make(shape=(8, 8) if shape[2:] == (1,) else shape)
    for source in (str(path), (x, y), (list(x), list(y)), (torch.tensor(x), torch.tensor(y))):
        check_pairs(with_synthetic(dls, source).train, coded(100, 0, shape[:2] if shape[2:] == (1,) else shape),
                    (gx, gy))

def test_read_only_arrays(tmp_path):
    "As of a memory-mapped file"
    x, y = coded(50, 1)
    x.flags.writeable = y.flags.writeable = False
    check_pairs(with_synthetic(make(), (x, y)).train, coded(100, 0), (x, y))

def refused(path, match='', error=ValueError):
    with pytest.raises(error) as e: read_synthetic(path)
    assert str(path) in str(e.value) and match in str(e.value), str(e.value)
    return str(e.value)

@pytest.mark.parametrize('how', [np.savez, np.savez_compressed])
def test_truncated(how, tmp_path):
    data = npz(tmp_path/'a.npz', how, image=coded(20, 1)[0], label=np.arange(20) % 10).read_bytes()
    for cut in [*range(0, 200, 7), *range(200, len(data), 61), *range(len(data)-30, len(data))]:
        (tmp_path/'a.npz').write_bytes(data[:cut])
        refused(tmp_path/'a.npz', 'truncated')

@pytest.mark.parametrize('how', [np.savez, np.savez_compressed])
def test_damaged(how, tmp_path):
    "A byte changed, anywhere: either it does not matter, or it is told"
    x, y = coded(20, 1)
    data = npz(tmp_path/'a.npz', how, image=x, label=y).read_bytes()
    refused, rng = 0, random.Random(0)
    for i in range(0, len(data), 7):
        (tmp_path/'a.npz').write_bytes(data[:i] + bytes([data[i] ^ rng.randint(1, 255)]) + data[i+1:])
        try: got = read_synthetic(tmp_path/'a.npz')
        except ValueError as e: assert 'a.npz' in str(e); refused += 1
        else: assert np.array_equal(got[0], x) and np.array_equal(got[1], y)
    assert refused > len(data)/10

def test_no_npz(tmp_path):
    path = tmp_path/'a.npz'
    for data in (b'', b'PK', np.random.default_rng(0).bytes(3000), b'<html>', b'PK\3\4' + bytes(100),
                 b'PK\5\6' + bytes(18)):
        path.write_bytes(data); refused(path)
    with open(path, 'wb') as f: np.save(f, coded(20, 1)[0])
    refused(path, 'not an .npz file')
    with zipfile.ZipFile(path, 'w') as z: z.writestr('image.npy', 'no array'); z.writestr('label.npy', 'none')
    refused(path)
    refused(tmp_path/'none.npz', 'no file', FileNotFoundError); refused(tmp_path, 'no file', FileNotFoundError)

class Bomb:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, 'w')

@pytest.mark.filterwarnings('ignore:unclosed file')
@pytest.mark.parametrize('where', ['image', 'label', 'other'])
def test_object_arrays_are_not_unpickled(where, tmp_path):
    marker, path = tmp_path/'marker', tmp_path/'a.npz'
    x, y = coded(20, 1)
    arrays = dict(image=x, label=y) | {where: np.array([Bomb(marker)]*20, dtype=object)}
    npz(path, **arrays)
    if where == 'other': assert len(read_synthetic(path)[0]) == 20
    else: refused(path, f'`{where}` is object')
    with zipfile.ZipFile(path, 'w') as z: # entries that are pickles through and through
        for k in ('image', 'label'): z.writestr(f'{k}.npy', pickle.dumps(Bomb(marker)))
    refused(path)
    path.write_bytes(pickle.dumps(Bomb(marker))); refused(path)
    assert not marker.exists()
    npz(path, **arrays)
    with np.load(path, allow_pickle=True) as a: a[where] # the file is live
    assert marker.exists()

X, Y = coded(20, 1)
bad_arrays = {
    'float image': (dict(image=X/255, label=Y), 'images must be uint8'),
    'int64 image': (dict(image=X.astype('i8'), label=Y), 'images must be uint8'),
    'uint16 image': (dict(image=X.astype('u2'), label=Y), 'images must be uint8'),
    'int8 image': (dict(image=X.astype('i1'), label=Y), 'images must be uint8'),
    'float label': (dict(image=X, label=Y/1), 'labels integers'),
    'text label': (dict(image=X, label=Y.astype(str)), 'labels integers'),
    'bool label': (dict(image=X, label=Y > 3), 'labels integers'),
    'column label': (dict(image=X, label=Y[:,None]), 'labels integers'),
    'one label': (dict(image=X, label=np.int64(3)), 'labels integers'),
    'flat image': (dict(image=X[0], label=Y), 'images must be uint8'),
    'video': (dict(image=X[None,...,None], label=Y), 'images must be uint8'),
    'fewer labels': (dict(image=X, label=Y[1:]), '20 images and 19 labels'),
    'more labels': (dict(image=X[1:], label=Y), '19 images and 20 labels'),
    'none': (dict(image=X[:0], label=Y[:0]), '0 images'),
    'no label': (dict(image=X), 'no array `label`'),
    'no image': (dict(images=X, label=Y), 'no array `image`'),
    'structured': (dict(image=np.zeros((20, 8, 8), [('é', 'u1')]), label=Y), '')}

@pytest.mark.filterwarnings('ignore:Stored array in format 3.0')
@pytest.mark.parametrize('name', bad_arrays)
def test_bad_arrays(name, tmp_path):
    arrays, match = bad_arrays[name]
    refused(npz(tmp_path/'a.npz', **arrays), match)
    with pytest.raises(ValueError, match='a.npz'): with_synthetic(make(), tmp_path/'a.npz')
    if set(arrays) == {'image', 'label'} and name != 'structured':
        # not by the back door either
        with pytest.raises(ValueError, match='`npz`'): with_synthetic(make(), (arrays['image'], arrays['label']))

def test_images_that_do_not_fit(tmp_path):
    dls = make()
    for source in (lambda x, y: (x, y), lambda x, y: npz(tmp_path/'a.npz', image=x, label=y)):
        for y in (Y-1, Y+1):
            with pytest.raises(ValueError, match='label'): with_synthetic(dls, source(X, y))
        for shape in ((9, 9), (8, 9), (8, 8, 3), (8, 8, 4)):
            with pytest.raises(ValueError, match='images'): with_synthetic(dls, source(coded(20, 1, shape)[0], Y))
        with pytest.raises(ValueError, match='images'): with_synthetic(make(shape=(8, 8, 3)), source(X, Y))
        with pytest.raises(ValueError, match='images'):
            with_synthetic(make(shape=(8, 8, 3)), source(X.repeat(8, 1).reshape(20, 8, 8, 8)[:,:3], Y)) # channels first

def test_dls_that_do_not_fit(pil):
    "Several classes an image, or none"
    dls, syn, rgb = pil
    for block,get_y in ((MultiCategoryBlock(vocab=[str(i) for i in range(10)]), lambda p: [p.stem.split('_')[1]]),
                        (RegressionBlock, lambda p: 3.)):
        other = DataBlock((ImageBlock(PILImage if rgb else PILImageBW), block), get_y=get_y,
                          item_tfms=Resize(8)).dataloaders(sorted(dls.path.glob('*.png')), bs=10, num_workers=0)
        with pytest.raises(ValueError, match='one class per image'): with_synthetic(other, syn)

def test_float_items():
    "0–255 would be mixed with [0, 1]"
    items = [(TensorImageBW(torch.rand(1, 8, 8)), TensorCategory(i % 10)) for i in range(40)]
    dls = DataLoaders(*[TfmdDL(items, bs=10, num_workers=0) for _ in range(2)])
    dls.vocab = list(range(10))
    with pytest.raises(TypeError, match='float32'): with_synthetic(dls, SYN)

def entry(shape, fortran=False, descr='|u1', data=b'', version=1):
    head = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    head += b' '*(-(len(head) + 11) % 64) + b'\n'
    return b'\x93NUMPY' + bytes([version, 0]) + struct.pack('<H' if version == 1 else '<I', len(head)) + head + data

@pytest.mark.parametrize('shape', ['(1000000000000, 8, 8)', '(-20, 8, 8)', '(-4, -5, 64)', '(20, 8, 8.)',
                                   '(99999999999999999999999, 8, 8)', '(20, 8, 8', '((((', '[20, 8, 8]', '("a", 8, 8)',
                                   '(True, 8, 8)', '(4294967296, 4294967296, 1)', '(2**99, 8, 8)', '("""',
                                   '(' + '-'*5000 + '1,8,8)', '('*9000])
def test_absurd_headers(shape, tmp_path):
    "Refused before memory is taken"
    for version in (1, 2, 3, 9):
        with zipfile.ZipFile(tmp_path/'a.npz', 'w') as z:
            z.writestr('image.npy', entry(shape, data=X.tobytes(), version=version))
            z.writestr('label.npy', entry('(20,)', data=bytes(20)))
        tracemalloc.start()
        try: refused(tmp_path/'a.npz')
        finally: peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        assert peak < 30e6

@pytest.mark.parametrize('n', [10**7, 10**9, 10**12])
@pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_directory_that_lies_as_the_header_does(n, method, tmp_path):
    path = tmp_path/'a.npz'
    for liars in (('image.npy',), ('image.npy', 'label.npy')):
        with zipfile.ZipFile(path, 'w', method) as z:
            z.writestr('image.npy', entry(f'({n}, 8, 8)')); z.writestr('label.npy', entry(f'({n},)'))
            for i in z.infolist():
                if i.filename in liars: i.file_size += n*(64 if i.filename == 'image.npy' else 1)
                if i.filename in liars and method == zipfile.ZIP_STORED: i.compress_size = i.file_size
            z._didModify = True
        tracemalloc.start()
        try: refused(path)
        finally: peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        assert peak < 30e6

def test_an_entry_that_hides_another(tmp_path):
    "`np.load` prefers `image` to `image.npy`, of which the header was looked at"
    x, y = coded(20, 1)
    for hidden in (b'no array', entry('(20, 8, 8)', descr='<f4', data=bytes(20*64*4))):
        path = npz(tmp_path/'a.npz', image=x, label=y)
        with zipfile.ZipFile(path, 'a') as z: z.writestr('image', hidden)
        assert np.array_equal(read_synthetic(path)[0], x)

def test_encrypted_and_unknown_compression(tmp_path):
    path = npz(tmp_path/'a.npz', image=X, label=Y)
    data = path.read_bytes()
    at = data.index(b'PK\1\2')
    path.write_bytes(data[:6] + b'\1' + data[7:at+8] + b'\1' + data[at+9:]); refused(path, 'truncated')
    path.write_bytes(data[:8] + b'\x63' + data[9:at+10] + b'\x63' + data[at+11:]); refused(path, 'truncated')

def test_normalize_of_the_training_batches_alone_is_refused():
    with pytest.raises(ValueError, match='Normalize.*batch_tfms'):
        with_batch_tfms(digits_dls(), Normalize.from_stats([.3], [.4]))

@pytest.mark.parametrize('kind', ['none', 'flip'])
def test_images_keep_their_size_without_augmentation(kind, tmp_path):
    """fastai counts `Resize` among what is random, since it crops anywhere in training; here it crops where it does
    in validation"""
    rng = np.random.default_rng(0)
    for c in 'ab':
        (tmp_path/c).mkdir()
        for i,size in enumerate([(40,30), (30,40), (48,32), (32,32), (50,20), (20,50)]):
            PILImage.create(rng.integers(0, 255, (*size,3), dtype=np.uint8)).save(tmp_path/c/f'{i}.png')
    made = lambda **k: ImageDataLoaders.from_folder(tmp_path, valid_pct=.3, seed=0, bs=4, num_workers=0, **k)
    new = with_augmentation(made(item_tfms=Resize((16, 12))), kind)
    assert new.train.one_batch()[0].shape == (4, 3, 16, 12) and new.valid.one_batch()[0].shape[1:] == (3, 16, 12)
    got, want = (torch.cat([b[0] for b in dl]) for dl in (new.train.new(shuffle=False, drop_last=False),
                                                          new.test_dl(new.train_ds.items)))
    same = torch.stack([torch.isclose(o, want).flatten(1).all(1) for o in (got, got.flip(-1))])
    assert same.any(0).all() and (same[0].all() if kind == 'none' else not same[0].all())
    class Zoom(Resize): "Somebody's own"
    with pytest.raises(ValueError, match='`dls` resize images by Zoom'):
        with_augmentation(made(item_tfms=Zoom(16)), kind)
    again = with_augmentation(new, kind).train
    assert torch.equal(again.new(shuffle=False, drop_last=False).one_batch()[1],
                       new.train.new(shuffle=False, drop_last=False)
                       .one_batch()[1]) and again.one_batch()[0].shape[2:] == (16, 12)
    with pytest.raises(ValueError, match='`dls` resize images by RandomResizedCrop'):
        with_augmentation(made(item_tfms=RandomResizedCrop(16)), kind)


# --- loaders of other classes, which fastai's `new` would make ordinary ---

ways = dict(bs=lambda d: with_bs(d, 16), augmentation=lambda d: with_augmentation(d, 'none'),
            batch_tfms=lambda d: with_batch_tfms(d, Cutout(2)),
            noise=lambda d: with_label_noise(d, 0.), subset=lambda d: with_subset(d, 60, n_valid=20))
each_way = pytest.mark.parametrize('way', ways.values(), ids=ways)

def loaders_of(make_dls, cls, **kw):
    "Training loader of the class `cls`"
    d = make_dls(n=96, n_valid=48, bs=32)
    return DataLoaders(cls(d.train_ds, bs=32, shuffle=True, num_workers=0, after_item=d.train.after_item,
                           after_batch=d.train.after_batch, **kw), d.valid)
def labels(ds): return np.array([int(y) for _,y in ds])

@each_way
def test_weights_are_kept(way, make_dls):
    "Those of a fastai `WeightedDL`: only threes are drawn, of a subset with the weights of its own images"
    d = make_dls(n=96)
    w = (labels(d.train_ds) == 3) * np.arange(1., 97)
    d = loaders_of(make_dls, WeightedDL, wgts=w)
    d.one_batch()
    new = way(d)
    assert type(new.train) is WeightedDL and {int(y) for _,ys in new.train for y in ys} == {3}
    idxs = getattr(new.train_ds, 'idxs', range(96))
    np.testing.assert_allclose(new.train.wgts, w[list(idxs)]/w[list(idxs)].sum())
    np.testing.assert_allclose(d.train.wgts, w/w.sum()) # the loader given stays

def test_a_subset_of_weight_0(make_dls):
    w = np.zeros(96); w[5] = 1
    d = loaders_of(make_dls, WeightedDL, wgts=w)
    with pytest.raises(ValueError, match='40 images of the subset have the weight 0.*`n`.*`seed`'):
        with_subset(d, 40, seed=next(s for s in range(9) if 5 not in random.Random(s).sample(range(96), 40)))

def test_weights_of_a_validation_loader(make_dls):
    d = loaders_of(make_dls, TfmdDL)
    d.loaders[1] = WeightedDL(d.valid_ds, bs=32, wgts=np.arange(48.), shuffle=True, num_workers=0,
                              after_item=d.train.after_item, after_batch=d.train.after_batch)
    few = with_subset(d, 60, n_valid=20).valid
    idxs = np.array(few.dataset.idxs)
    assert len(idxs) == 20
    np.testing.assert_allclose(few.wgts, idxs/idxs.sum())
    np.testing.assert_allclose(with_bs(d, 16).valid.wgts, np.arange(48)/sum(range(48)))

@each_way
def test_part_of_an_epoch_is_kept(way, make_dls):
    new = way(loaders_of(make_dls, PartialDL, partial_n=40)).train
    assert (type(new) is PartialDL and new.partial_n == 40 and sum(len(y) for _,y in new) in (32, 40)
            and len(new.get_idxs()) == 40)
def test_no_part_is_larger_than_the_whole(make_dls):
    assert with_subset(loaders_of(make_dls, PartialDL, partial_n=90), 60).train.partial_n == 60

class Hard(TfmdDL):
    "Draws by `power`, which it keeps by its name"
    def __init__(self, dataset, power, *, note='', **kwargs):
        super().__init__(dataset, **kwargs)
        self.power,self.note = power,note
class Hidden(TfmdDL):
    def __init__(self, dataset, power=1, **kwargs): super().__init__(dataset, **kwargs); self._p = power
class Inverse(TfmdDL):
    "Keeps something else by the name of its argument"
    def __init__(self, dataset, power=1, **kwargs): super().__init__(dataset, **kwargs); self.power = 2/power + 1
class Popped(TfmdDL):
    def __init__(self, dataset, **kwargs): self.power = kwargs.pop('power', 1); super().__init__(dataset, **kwargs)
class Own(Hidden):
    def new(self, dataset=None, cls=None, **kwargs): return super().new(dataset, cls, **dict(power=self._p) | kwargs)
class HardResident(ResidentDL):
    def __init__(self, *args, power=1, **kwargs): super().__init__(*args, **kwargs); self.power = power

@each_way
@pytest.mark.parametrize('cls', [Hard, Own, HardResident])
def test_a_loader_class_of_a_users(cls, way, make_dls):
    new = way(loaders_of(make_dls, cls, power=3)).train
    assert type(new) is cls and vars(new).get('power', vars(new).get('_p')) == 3

@each_way
@pytest.mark.parametrize('cls', [Hidden, Inverse, Popped])
def test_a_loader_class_that_would_lose_something(cls, way, make_dls):
    with pytest.raises(TypeError, match=f'`dls` have a {cls.__name__}, whose (argument )?`power` would be lost.*`new`'):
        way(loaders_of(make_dls, cls, power=3))

def test_what_belongs_to_each_image_of_an_unknown_class(make_dls):
    d = loaders_of(make_dls, Hard, power=list(range(96)))
    assert with_bs(d, 16).train.power == list(range(96))
    with pytest.raises(TypeError, match='a Hard whose `power` has one entry per image'): with_subset(d, 60)

@each_way
def test_the_first_n_stay_the_first_n(way, make_dls):
    d = loaders_of(make_dls, TfmdDL, n=70)
    first, new = {i for i in range(70)}, way(d).train
    assert new.n in (60, 70) and {getattr(new.dataset, 'idxs', range(96))[i] for i in new.get_idxs()} <= first
    with pytest.raises(ValueError, match='first 70 of 96 images'): with_synthetic(d, SYN)

def test_loaders_that_cannot_be_made_anew(make_dls):
    d = make_dls(n=96)
    of_torch = DataLoaders(torch.utils.data.DataLoader(d.train_ds, batch_size=32), d.valid)
    split = DataLoaders(DistributedDL(d.train, rank=0, world_size=2), d.valid)
    for dls,says in ((of_torch, "a DataLoader of torch.utils.data.*: use fastai's"),
                     (split, 'already split among processes.*distrib_ctx')):
        for f in (lambda d: with_bs(d, 16), lambda d: with_label_noise(d, 0.)):
            with pytest.raises(TypeError, match=says): f(dls)
