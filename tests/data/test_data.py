"Datasets in their published layouts, built small: what is read, what is refused, and what a `Learner` makes of it."
import gzip, pickle, struct
from collections import Counter
from importlib.resources import files

import numpy as np, pytest, torch
from fastai.vision.all import (Image, ImageDataLoaders, Learner, Path, PILImage, PILImageBW, Resize, TensorCategory,
                               TensorImage, TensorImageBW, accuracy, load_learner, nn, set_seed)

from rkd_fastai.data import benchmarks as data
from rkd_fastai.data.transforms import *
from rkd_fastai.data.arrays import *
from rkd_fastai.data.benchmarks import *

rng = np.random.default_rng(0)
def images(n, *shape): return rng.integers(0, 256, (n, *shape), dtype=np.uint8)
def labels(n, c=10): return np.arange(n) % c
def arrays(dl):
    "The pixels and labels of a loader, in its order, as uint8 and int"
    xs, ys = zip(*((x.cpu(), y.cpu()) for x, y in dl))
    return (torch.cat([torch.Tensor(x) for x in xs])*255).round().byte().numpy(), torch.cat(list(ys)).numpy()
def in_both(a, b): return {o.tobytes() for o in a} & {o.tobytes() for o in b}
def all_items(dl): return np.stack([np.asarray(x) for x, _ in dl.dataset])


# --- published layouts ---

def write_idx(path, a, zipped):
    raw = bytes([0, 0, 8, a.ndim]) + struct.pack(f'>{a.ndim}i', *a.shape) + a.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if zipped: path.with_name(path.name + '.gz').write_bytes(gzip.compress(raw))
    else: path.write_bytes(raw)

@pytest.fixture(params=[('', True), ('', False), ('FashionMNIST/raw', False)], ids=['gz', 'plain', 'torchvision'])
def fashion(tmp_path, request):
    sub, zipped = request.param
    d = dict(train=(images(100, 28, 28), labels(100)), t10k=(images(30, 28, 28), labels(30)))
    for split, (x, y) in d.items():
        write_idx(tmp_path/sub/f'{split}-images-idx3-ubyte', x, zipped)
        write_idx(tmp_path/sub/f'{split}-labels-idx1-ubyte', y, zipped)
    return tmp_path, d

class Python2Pickler(pickle._Pickler):
    "Protocol 2 as Python 2 wrote it: `str` is bytes"
    dispatch = dict(pickle._Pickler.dispatch)
    def save_bytes(self, o):
        self.write(b'U' + bytes([len(o)]) + o if len(o) < 256 else b'T' + struct.pack('<i', len(o)) + o)
        self.memoize(o)
    def save_str(self, o): self.save_bytes(o.encode('latin1'))
    dispatch[bytes], dispatch[str] = save_bytes, save_str

def write_pickle(path, o, py2=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'wb') as f: (Python2Pickler if py2 else pickle.Pickler)(f, protocol=2).dump(o)
    path.write_bytes(path.read_bytes().replace(b'numpy._core.multiarray', b'numpy.core.multiarray')
                     if py2 else path.read_bytes())

def write_cifar(root, c, py2=True, meta=True):
    "CIFAR-10 or -100 in `root`; its test images as rows, and labels"
    key, names = (b'labels', b'label_names') if c == 10 else (b'fine_labels', b'fine_label_names')
    train, test = ([f'data_batch_{i}' for i in range(1, 6)], 'test_batch') if c == 10 else (['train'], 'test')
    for f in [*train, test]:
        x, y = images(2*c, 3072), labels(2*c, c)
        write_pickle(root/f, {b'data': x, key: y.tolist(), b'batch_label': f.encode(), b'filenames': [b'a.png']*2*c},
                     py2)
    if meta:
        write_pickle(root/('batches.meta' if c == 10 else 'meta'), {names: [f'class {i}'.encode() for i in range(c)]},
                     py2)
    return x, y

@pytest.fixture
def tiny(tmp_path):
    root = tmp_path/'tiny-imagenet-200'
    def save(f, mode='RGB'):
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images(64, 64, 3)).convert(mode).save(f)
    for c in ('n02', 'n01'):
        # some are grey, as published
        for i in range(10): save(root/f'train/{c}/images/{c}_{i}.JPEG', 'L' if i == 3 else 'RGB')
    for i in range(4): save(root/f'val/images/val_{i}.JPEG')
    (root/'val/val_annotations.txt').write_text(''.join(
        f'val_{i}.JPEG\tn0{1 + i % 2}\t0\t0\t62\t62\n' for i in range(4)))
    return tmp_path


# --- what is read ---

def test_fashion_is_read_exactly(fashion):
    path, d = fashion
    dls = fashion_mnist_dls(path, bs=16)
    assert [len(o.dataset) for o in dls.loaders] == [90, 10, 30]
    x, y = arrays(dls[2])
    assert (x[:, 0] == d['t10k'][0]).all() and (y == d['t10k'][1]).all()
    both = np.concatenate([all_items(dls.train), all_items(dls.valid)])[:, 0]
    assert {o.tobytes() for o in both} == {o.tobytes() for o in d['train'][0]} and len(both) == 100
    assert not in_both(all_items(dls.train), all_items(dls.valid))
    assert list(dls.vocab) == fashion_vocab and dls.c == 10

@pytest.mark.parametrize('c,dls_of,sub', [(10, cifar10_dls, 'cifar-10-batches-py'),
                                          (100, cifar100_dls, 'cifar-100-python')])
@pytest.mark.parametrize('py2', [True, False])
def test_cifar_is_read_exactly(tmp_path, c, dls_of, sub, py2):
    x, y = write_cifar(tmp_path/sub, c, py2)
    for path in (tmp_path, tmp_path/sub):
        dls = dls_of(path, bs=16, valid_pct=.5)
        got, lbl = arrays(dls[2])
        assert (got.reshape(len(got), -1) == x).all() and (lbl == y).all()   # rows of channels, then rows, as published
    n = 2*c*(5 if c == 10 else 1)
    assert [len(o.dataset) for o in dls.loaders] == [n//2, n//2, 2*c]
    assert list(dls.vocab) == [f'class {i}' for i in range(c)]
    assert not in_both(all_items(dls.train), all_items(dls.valid)) and not in_both(all_items(dls.train), got)

def test_cifar_without_names(tmp_path):
    write_cifar(tmp_path, 10, meta=False)
    assert list(cifar10_dls(tmp_path, bs=8).vocab) == list(range(10))
    write_pickle(tmp_path/'batches.meta', {b'label_names': [b'one']})
    with pytest.raises(ValueError, match='does not name 10 classes'): cifar10_dls(tmp_path)

def test_tiny_imagenet(tiny):
    for path in (tiny, tiny/'tiny-imagenet-200'):
        dls = tiny_imagenet_dls(path, bs=4, valid_pct=.2, num_workers=0)
        assert [len(o.dataset) for o in dls.loaders] == [16, 4, 4] and list(dls.vocab) == ['n01', 'n02']
    x, y = arrays(dls[2])
    files_ = sorted((tiny/'tiny-imagenet-200/val/images').iterdir())
    assert ((x == np.stack([np.asarray(Image.open(f)).transpose(2, 0, 1) for f in files_])).all()
            and y.tolist() == [0, 1, 0, 1])
    assert {x.shape for x, _ in dls.train_ds} == {(3, 64, 64)}   # the grey ones too
    assert not {f for f, _ in dls.train_ds.items} & {f for f, _ in dls.valid_ds.items}
    held = [list(tiny_imagenet_dls(tiny, bs=4, valid_pct=.2, seed=i, num_workers=0).valid_ds.items) for i in (1, 1, 2)]
    assert held[0] == held[1] != held[2]

def test_digits():
    from sklearn.datasets import load_digits
    o, dls = load_digits(), digits_dls()
    both = np.concatenate([all_items(dls.train), all_items(dls.valid)])[:, 0]
    oracle = np.rint(o.images.astype(np.float64)*255/16).astype(np.uint8)
    assert sorted(x.tobytes() for x in both) == sorted(x.tobytes() for x in oracle)
    x, y = dls.train.one_batch()
    assert (type(x) is TensorImageBW and x.shape == (128, 1, 8, 8) and x.dtype == torch.float32
            and 0 <= x.min() and x.max() == 1)
    assert type(y) is TensorCategory and y.dtype == torch.int64 and list(dls.vocab) == list(range(10))
    share = Counter(o[1].item() for o in dls.valid_ds)
    assert all(abs(share[i] - .2*(o.target == i).sum()) <= 1 for i in range(10))

def test_split_is_reproducible_and_leaves_the_seed_alone():
    set_seed(7)
    a = torch.rand(3)
    set_seed(7)
    first = all_items(digits_dls(seed=1).valid)
    assert (torch.rand(3) == a).all()
    assert (all_items(digits_dls(seed=1).valid) == first).all()
    assert not (all_items(digits_dls(seed=2).valid) == first).all()


# --- the sample ---

@pytest.fixture(scope='module')
def npz():
    with (files('rkd_fastai')/'samples/fashion_sample.npz').open('rb') as f: return dict(np.load(f, allow_pickle=False))

def test_sample_facts(npz):
    assert sorted(npz) == ['x_test', 'x_train', 'y_test', 'y_train']
    for o in ('train', 'test'):
        x, y = npz[f'x_{o}'], npz[f'y_{o}']
        assert (x.shape, x.dtype, y.shape, y.dtype) == ((1000, 28, 28), np.uint8, (1000,), np.uint8)
        assert x.min() == 0 and x.max() == 255 and (np.bincount(y) == 100).all()
    assert not in_both(npz['x_train'], npz['x_test'])
    # file order
    assert npz['y_train'][:5].tolist() == [9, 0, 0, 3, 0] and npz['y_test'][:5].tolist() == [9, 2, 1, 1, 6]
    assert (files('rkd_fastai')/'samples/fashion_sample.npz').stat().st_size < 1_200_000
    assert 'Zalando SE' in (files('rkd_fastai')/'samples/README.md').read_text()

@pytest.mark.parametrize('size', [14, 28])
def test_sample_loaders(npz, size):
    dls = fashion_sample_dls(size=size)
    x, y = arrays(dls.valid)
    pooled = np.zeros((1000, 14, 14))
    for i in range(14):
        for j in range(14): pooled[:, i, j] = npz['x_test'][:, 2*i:2*i+2, 2*j:2*j+2].astype(np.float64).sum((1, 2))/4
    assert (x[:, 0] == (np.rint(pooled) if size == 14 else npz['x_test'])).all() and (y == npz['y_test']).all()
    assert len(dls) == 2 and len(dls.train) == 8 and dls.train.bs == 125
    with pytest.raises(ValueError, match='`size` must be 14 or 28'): fashion_sample_dls(size=size + 1)

def test_sample_is_flipped_only():
    dls = fashion_sample_dls(drop_last=False)
    x, mine = arrays(dls.train)[0], all_items(dls.train)
    either = {o.tobytes() for o in mine} | {np.ascontiguousarray(o[..., ::-1]).tobytes() for o in mine}
    assert {o.tobytes() for o in x} <= either
    assert 400 < sum(o.tobytes() in {o.tobytes() for o in mine} for o in x) < 600


# --- augmentation ---

@pytest.mark.parametrize('pad', [0, 2, 4])
def test_crop_and_flip_against_loops(pad):
    set_seed(3)
    x = TensorImage(torch.randint(1, 256, (64, 3, 6, 5), dtype=torch.uint8))
    out, padded = PadCropFlip(pad)(x, split_idx=0), torch.nn.functional.pad(x, [pad]*4)
    found = []
    for o, p in zip(out, padded):
        found += [(i, j, f) for i in range(2*pad + 1) for j in range(2*pad + 1) for f in (0, 1)
                  if torch.equal(o, p[:, i:i+6, j:j+5].flip(-1) if f else p[:, i:i+6, j:j+5])][:1]
    assert len(found) == 64 and type(out) is TensorImage and out.dtype == torch.uint8
    assert 16 < sum(f for *_, f in found) < 48 and len(set(found)) > (1, 20)[pad > 0]

def test_augmentation_is_for_training_only(tmp_path):
    write_cifar(tmp_path, 10)
    dls = cifar10_dls(tmp_path, bs=45, valid_pct=.1)
    x = arrays(dls.train)[0]
    # a crop of 81 offsets leaves few as they were
    assert len(in_both(x, all_items(dls.train))) < 15
    assert x.min() >= 0 and dls.train.one_batch()[0].max() <= 1
    for dl in (dls.valid, dls[2]): assert (arrays(dl)[0] == all_items(dl)).all()
    item = dls.train_ds.items[0][0]
    assert (arrays(dls.test_dl([item]*20, with_labels=False)
                   .new(create_batch=lambda b: (torch.stack([o[0] for o in b]), torch.zeros(len(b)))))[0]
            == item.transpose(2, 0, 1)).all()

@pytest.mark.parametrize('pad,dls_of', [(2, 'fashion'), (4, 'cifar'), (4, 'tiny')])
def test_padding_of_each_dataset(pad, dls_of, tmp_path, request):
    if dls_of == 'tiny': dls = tiny_imagenet_dls(request.getfixturevalue('tiny'), bs=4, num_workers=0)
    elif dls_of == 'cifar': write_cifar(tmp_path, 10); dls = cifar10_dls(tmp_path, bs=4)
    else:
        for split in ('train', 't10k'):
            write_idx(tmp_path/f'{split}-images-idx3-ubyte', images(100, 28, 28), True)
            write_idx(tmp_path/f'{split}-labels-idx1-ubyte', labels(100), True)
        dls = fashion_mnist_dls(tmp_path, bs=4)
    assert [o.pad for o in dls.train.after_batch.fs if isinstance(o, PadCropFlip)] == [pad]

@pytest.mark.parametrize('side', [1, 4, 5, 20])
def test_cutout_against_loops(side):
    "Each image is black where its square falls, of which any pixel can be the centre, and as it was elsewhere"
    set_seed(3)
    x = TensorImage(torch.randint(1, 256, (300, 3, 6, 5), dtype=torch.uint8))
    out, found = Cutout(side)(x, split_idx=0), set()
    for o, i in zip(out, x):
        centres = [(r, c) for r in range(6) for c in range(5)]
        def cut(r, c):
            want, top, left = i.clone(), r - side//2, c - side//2
            want[:, max(top, 0):top+side, max(left, 0):left+side] = 0
            return want
        found.add(next(rc for rc in centres if torch.equal(o, cut(*rc))))
    assert len(found) > (25 if side < 20 else 0) and out.dtype == torch.uint8 and type(out) is TensorImage


# --- on the device ---

def batches(dls): return [[t.cpu() for t in b] for dl in dls.loaders for _ in range(2) for b in dl]

@pytest.mark.parametrize('kind', ['sample', 'digits', 'fashion', 'cifar', 'tiny'])
def test_resident_batches_are_the_same(kind, tmp_path, request):
    "Order, augmentation, types and dtypes, over two epochs"
    if kind == 'cifar': write_cifar(tmp_path, 10)
    path = request.getfixturevalue('tiny') if kind == 'tiny' else tmp_path
    if kind == 'fashion':
        for split in ('train', 't10k'):
            write_idx(tmp_path/f'{split}-images-idx3-ubyte', images(100, 28, 28), True)
            write_idx(tmp_path/f'{split}-labels-idx1-ubyte', labels(100), True)
    make = dict(sample=fashion_sample_dls, digits=digits_dls, fashion=lambda **kw: fashion_mnist_dls(path, **kw),
                cifar=lambda **kw: cifar10_dls(path, **kw),
                tiny=lambda **kw: tiny_imagenet_dls(path, num_workers=0, **kw))[kind]
    bs, found = dict(sample=200, digits=500, fashion=16, cifar=16, tiny=4)[kind], []
    for resident in (False, True):
        set_seed(0)
        dls = make(bs=bs, batch_tfms=Cutout(3), device_resident=resident)
        assert (type(dls.train) is ResidentDL) == resident
        found.append(batches(dls))
    assert len(found[0]) == len(found[1]) == 2*sum(map(len, dls.loaders))
    for a, b in zip(*found):
        for t, u in zip(a, b): assert type(t) is type(u) and t.dtype == u.dtype and torch.equal(t, u)
    assert dls.train.items()[0].dtype == torch.uint8

def test_resident_items_are_made_once(monkeypatch):
    made, do_item = [], ResidentDL.do_item
    monkeypatch.setattr(ResidentDL, 'do_item', lambda self, i: (made.append(1), do_item(self, i))[1])
    dls = digits_dls(device_resident=True)
    batches(dls); n = len(made)
    batches(dls); list(dls.valid.new(shuffle=False, drop_last=False))
    assert len(made) == n and dls.valid.new().items()[0].data_ptr() == dls.valid.items()[0].data_ptr()
    other = dls.test_dl([images(1, 8, 8)[0]]*3)
    assert len(other.items()[0]) == 3 and other.items()[0].data_ptr() != dls.valid.items()[0].data_ptr()

def test_resident_in_a_data_block(tmp_path):
    "Any data block takes it, an image folder for one; what is random or uneven is refused"
    from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, RandomResizedCrop, Resize, get_image_files,
                                   parent_label)
    for i in range(12):
        (tmp_path/'ab'[i%2]).mkdir(exist_ok=True)
        Image.fromarray(images(20 + i, 20, 3)).save(tmp_path/'ab'[i%2]/f'{i}.png')
    def make(item_tfms, **kw):
        return DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label,
                         item_tfms=item_tfms).dataloaders(tmp_path, bs=4, num_workers=0, **kw)
    found = []
    for kw in ({}, dict(dl_type=ResidentDL)): set_seed(0); found.append(batches(make(Resize(16, 'squish'), **kw)))
    for a, b in zip(*found): assert all(torch.equal(t, u) for t, u in zip(a, b))
    for tfm in (Resize(16), RandomResizedCrop(16)): # `Resize` crops somewhere else each time, too
        with pytest.raises(ValueError, match='an item transform is random'): make(tfm, dl_type=ResidentDL).train.items()
        make(tfm, dl_type=ResidentDL).valid.items() # validation crops the centre
    with pytest.raises(ValueError, match='resize the images to one size'): make([], dl_type=ResidentDL).train.items()


# --- a Learner ---

def small_learner(dls, d):
    c, h, w = dls.train_ds[0][0].shape
    return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(c*h*w, dls.c)), metrics=accuracy, path=d)

# fastai's, in loading and in showing
@pytest.mark.filterwarnings('ignore:.*load_learner.*', 'ignore:.*__array__.*copy.*:DeprecationWarning')
@pytest.mark.parametrize('resident', [False, True], ids=['', 'resident'])
@pytest.mark.parametrize('kind', ['grey', 'rgb', 'tiny'])
def test_learner_fits_exports_and_predicts(kind, resident, tmp_path, request):
    shape = dict(grey=(28, 28), rgb=(32, 32, 3)).get(kind, (64, 64, 3))
    if kind == 'tiny':
        dls = tiny_imagenet_dls(request.getfixturevalue('tiny'), bs=4, num_workers=0, valid_pct=.2,
                                device_resident=resident)
    else:
        dls = arrays_dls((images(3000, *shape), labels(3000, 3)), (images(9, *shape), labels(9, 3)), vocab='abc',
                         bs=500, device_resident=resident)
    learn = small_learner(dls, tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        learn.show_results()
        dls.show_batch()
        learn.export()
    params = 4*sum(p.numel() for p in learn.model.parameters())
    assert (tmp_path/'export.pkl').stat().st_size < params + 60_000       # no images, no indices
    again = load_learner(tmp_path/'export.pkl')
    img = images(1, *shape)[0]
    Image.fromarray(img).save(tmp_path/'img.png')
    x = torch.tensor(img if img.ndim == 3 else img[..., None]).permute(2, 0, 1)[None]/255
    want = again.model.cpu()(x).softmax(-1)[0]
    pil = (PILImageBW if kind == 'grey' else PILImage).create(img)
    with again.no_bar():
        for o in (img, pil, Image.fromarray(img), tmp_path/'img.png', str(tmp_path/'img.png'),
                  (tmp_path/'img.png').read_bytes()):
            name, idx, probs = again.predict(o)
            torch.testing.assert_close(torch.Tensor(probs), want, atol=1e-6, rtol=0)
            assert name == dls.vocab[want.argmax().item()] and idx == want.argmax()

def test_predict_an_item_and_refuse_floats(tmp_path):
    learn = small_learner(
        arrays_dls((images(40, 8, 8), labels(40, 4)), (images(8, 8, 8), labels(8, 4)), bs=8), tmp_path)
    img = learn.dls.valid_ds.items[0][0]
    with learn.no_bar():
        assert torch.equal(learn.predict(learn.dls.valid_ds[0][0])[2], learn.predict(img)[2])
        assert torch.equal(learn.predict(np.stack([img]*3, -1))[2], learn.predict(img)[2])   # grey, saved in colour
        for bad in (img/255, torch.rand(1, 8, 8)):
            with pytest.raises(ValueError, match='must be uint8'): learn.predict(bad)

def test_test_dl_with_labels():
    dls = digits_dls()
    x, y = next(iter(dls.test_dl([(images(1, 8, 8)[0], 7), (images(1, 8, 8)[0], 3)], with_labels=True)))
    assert x.shape == (2, 1, 8, 8) and y.tolist() == [7, 3]


# --- what is refused ---

def test_arguments():
    xy = images(40, 8, 8), labels(40, 4)
    for bs in (0, -1, 41):
        with pytest.raises(ValueError, match='`bs`'): arrays_dls(xy, xy, bs=bs)
    for p in (0, 1, -.1, 5):
        with pytest.raises(ValueError, match='`valid_pct`'): digits_dls(valid_pct=p)
    bad = {'images must be uint8': [(xy[0]/255, xy[1]), (xy[0][:0], xy[1][:0]), (images(40, 3, 8, 8), xy[1]),
                                    (xy[0][0], xy[1])],
           'labels must be 40 integers': [(xy[0], xy[1][1:]),
                                          (xy[0], xy[1] - 1), (xy[0], xy[1]/1), (xy[0], xy[1][:, None])],
           'labels must be below 4': [(xy[0], xy[1] + 1)],
           'images must be .* as in train': [(images(40, 8, 9), xy[1]), (images(40, 8, 8, 3), xy[1])]}
    for msg, pairs in bad.items():
        for o in pairs:
            with pytest.raises(ValueError, match=f'valid: .*{msg}'): arrays_dls(xy, o, vocab='abcd', bs=8)
            with pytest.raises(ValueError, match=f'test: .*{msg}'): arrays_dls(xy, xy, o, vocab='abcd', bs=8)
    with pytest.raises(ValueError, match='`vocab` must not name a class twice'): arrays_dls(xy, xy, vocab='aabc', bs=8)

def test_idx_damage(tmp_path):
    f, x = tmp_path/'a', images(5, 4, 4)
    write_idx(f, x, False)
    good = f.read_bytes()
    assert (read_idx(f, (4, 4)) == x).all()
    for msg, raw in {'not an IDX file': [b'', b'\0\0\x0b\3' + good[4:], b'\0\0\x08\1' + good[4:], b'<html>'],
                     'does not contain': [good[:-1], good + b'\0', good[:10],
                                          good[:8] + struct.pack('>2i', 2, 8) + good[16:]]}.items():
        for o in raw:
            f.write_bytes(o)
            with pytest.raises(ValueError, match=f'{f} (is )?{msg}'): read_idx(f, (4, 4))
    packed = gzip.compress(good)
    for o in (packed[:-9], packed[:12] + b'\xff'*8 + packed[20:], b'plain', b''):
        (tmp_path/'a.gz').write_bytes(o)
        with pytest.raises(ValueError, match='a.gz is '): read_idx(tmp_path/'a.gz', (4, 4))

def test_files_that_are_missing_or_disagree(tmp_path, tiny):
    for dls_of, name in ((fashion_mnist_dls, 'train-images'), (cifar10_dls, 'data_batch_1'), (cifar100_dls, 'train'),
                         (tiny_imagenet_dls, 'train')):
        with pytest.raises(FileNotFoundError, match=f'{name}.* not found in .*remove `path`'): dls_of(tmp_path/'no')
    f = tmp_path/'f'
    for split in ('train', 't10k'):
        write_idx(f/f'{split}-images-idx3-ubyte', images(40, 28, 28), False)
        write_idx(f/f'{split}-labels-idx1-ubyte', labels(39), False)
    with pytest.raises(ValueError, match='f, train: labels must be 40 integers'): fashion_mnist_dls(f)
    write_idx(f/'train-labels-idx1-ubyte', labels(40, 11), False)
    with pytest.raises(ValueError, match='f, train: labels must be below 10'): fashion_mnist_dls(f)
    root = tiny/'tiny-imagenet-200'
    (root/'val/images/val_2.JPEG').unlink()
    with pytest.raises(ValueError, match='lists val_2.JPEG of class n01'): tiny_imagenet_dls(tiny)
    for o in root.glob('train/*/images/*'): o.unlink()
    with pytest.raises(FileNotFoundError, match='has no CLASS/images'): tiny_imagenet_dls(tiny)

def test_cifar_damage(tmp_path):
    x, _ = write_cifar(tmp_path, 100)
    f = tmp_path/'train'
    good = f.read_bytes()
    for o in (b'', good[:-200], good[:50], b'<html>'):
        f.write_bytes(o)
        with pytest.raises(ValueError, match=f'{f} is not a file of CIFAR'): cifar100_dls(tmp_path)
    y = labels(200, 100).tolist()
    for msg, o in (('does not contain', {b'data': x, b'labels': y}),
                   ('does not contain', {b'data': x[:, 1:], b'fine_labels': y}), ('does not contain', [x, y]),
                   ('images must be uint8', {b'data': x/1, b'fine_labels': y}),
                   ('labels must be 200 integers', {b'data': x, b'fine_labels': y[1:]}),
                   ('labels must be below 100', {b'data': x, b'fine_labels': [100, *y[1:]]})):
        write_pickle(f, o)
        with pytest.raises(ValueError, match=f'{f}.* {msg}'): cifar100_dls(tmp_path)

class Runs:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

def test_a_pickle_runs_nothing(tmp_path):
    import builtins, os
    marker = tmp_path/'marker'
    for call in (Runs(os.system, f'touch {marker}'), Runs(builtins.exec, f'open({str(marker)!r},"w")'),
                 Runs(builtins.open, str(marker), 'w'),
                 Runs(np.save, str(marker), 1), Runs(getattr, 'a', 'upper'), Runs(Path, 'x')):
        for protocol in (0, 2, 4):
            (tmp_path/'data_batch_1').write_bytes(pickle.dumps({b'data': [call]}, protocol=protocol))
            with pytest.raises(ValueError, match='a disallowed'): cifar10_dls(tmp_path)
    # a dotted name under an innocent module
    (tmp_path/'data_batch_1').write_bytes(b'\x80\x04\x8c\x05numpy\x8c\x12lib.npyio.os.popen\x93.')
    with pytest.raises(ValueError, match='a disallowed'): read_pickle(tmp_path/'data_batch_1')
    assert not list(tmp_path.glob('marker*'))


# --- without a path ---

def test_downloads_are_asked_for_where_they_belong(tmp_path, monkeypatch, fashion, tiny):
    asked = []
    def cifar(root, download): asked.append((Path(root), download)); write_cifar(Path(root)/'cifar-10-batches-py', 10)
    monkeypatch.setattr(data, 'fastai_path', lambda k: tmp_path/k)
    monkeypatch.setattr(data.tvd, 'CIFAR10', cifar)
    assert len(cifar10_dls(bs=8)) == 3 and asked == [(tmp_path/'data', True)]
    monkeypatch.setattr(data, 'untar_data', lambda url: asked.append(url) or tiny/'tiny-imagenet-200')
    assert (len(tiny_imagenet_dls(bs=8, num_workers=0, valid_pct=.2)) == 3
            and asked[1].endswith('/tiny-imagenet-200.zip'))
    monkeypatch.setattr(data, '_get_fashion', lambda: fashion[0])
    assert len(fashion_mnist_dls(bs=8)) == 3

def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    def fails(*args, **kwargs): raise RuntimeError('Error downloading x.gz:\nno network')
    monkeypatch.setattr(data, 'fastai_path', lambda k: tmp_path/k)
    for name in ('CIFAR10', 'CIFAR100', 'FashionMNIST'): monkeypatch.setattr(data.tvd, name, fails)
    monkeypatch.setattr(data, 'untar_data', fails)
    # no package of Debian's
    monkeypatch.setattr(data, 'Path', lambda p: tmp_path/'none' if 'datasets' in str(p) else Path(p))
    for dls in (cifar10_dls, cifar100_dls, tiny_imagenet_dls, fashion_mnist_dls):
        with pytest.raises(OSError, match='cannot be downloaded: give the folder .*`path`.*no network') as e: dls()
        assert '\n' not in str(e.value)


# --- files that cannot be read ---

damage = dict(truncated=lambda b: b[:len(b)//2], empty=lambda b: b'', text=lambda b: b'this is no image',
              header=lambda b: b[:30])

# fastai leaves a file open that PIL cannot read
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('kind', damage)
@pytest.mark.parametrize('suffix', ['png','jpg'])
def test_a_damaged_image_is_named(suffix, kind, make_images):
    "With fastai's own blocks, in training and in validation, and in the loaders of this package"
    folder = make_images(n=4, size=40)
    for f in folder.rglob('*.png'):
        if suffix == 'jpg': Image.open(f).save(f.with_suffix('.jpg')); f.unlink()
    bad = folder/f'dark/2.{suffix}'
    bad.write_bytes(damage[kind](bad.read_bytes()))
    dls = ImageDataLoaders.from_folder(folder, valid_pct=.5, seed=1, bs=2, num_workers=0, img_cls=FileImage,
                                       item_tfms=Resize(16, 'squish'))
    with pytest.raises(OSError, match=r'image `.*dark.2.*` cannot be read \(.*\): '
                                      r'delete it, or replace it by an intact copy'):
        [len(b) for dl in dls.loaders for b in dl]
    with pytest.raises(OSError, match=r'image `.*dark.2.*` cannot be read'): OpenImage(PILImage)(bad)

def test_whole_images_are_pilimages(make_images):
    folder = make_images(n=4, size=40)
    make = lambda **kw: ImageDataLoaders.from_folder(folder, valid_pct=.5, seed=1, bs=4, num_workers=0,
                                                     item_tfms=Resize(16, 'squish'), **kw)
    for a,b in zip(make(img_cls=FileImage).valid.one_batch(), make().valid.one_batch()):
        assert type(a) is type(b) and torch.equal(a, b)
    with pytest.raises(FileNotFoundError): FileImage.create(folder/'none.png')
