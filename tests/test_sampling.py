"Numbers of a part of the images: a stratified sample in every place, on splits that are ordered by class."
import csv, json, random
from functools import partial
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, pytest, torch, torch.nn as nn
from PIL import Image
from fastai.vision.all import DataLoaders, ImageDataLoaders, Resize, accuracy, get_image_files
from rkd_fastai import callback
from rkd_fastai.all import *
from rkd_fastai.data.images import measured_images, measured_positions, pixel_data
from rkd_fastai.cli.main import main
from rkd_fastai.data.arrays import arrays_dls
from rkd_fastai.study.run import make_dls
from rkd_fastai.sampling import class_labels, stratified_order
from rkd_fastai.study.study import Runner, Study

# --- one network, one number, in every place ---

class Always(nn.Module):
    "Every image is of the first class"
    def __init__(self, n_out):
        super().__init__()
        self.head = nn.Linear(64, n_out)
        nn.init.zeros_(self.head.weight)
        with torch.no_grad(): self.head.bias.copy_(3*torch.eye(n_out)[0])
    def forward(self, x): return self.head(x.flatten(1))

n = 40
sizes = {2: (90,30), 10: (40,5,20,10,8,12,30,6,9,10)} # the first class comes first, and is never the smallest

def ordered(sizes, seed=0):
    "Noise, one class after the other"
    y = np.repeat(range(len(sizes)), sizes)
    return np.random.default_rng(seed).integers(0, 256, (len(y),8,8), dtype=np.uint8), y

@pytest.fixture(params=sizes.values(), ids=sizes)
def learn(request, make_learner):
    parts = [ordered(request.param, seed) for seed in range(3)]
    return make_learner(arrays_dls(*parts, bs=16), Always(len(request.param)), lr=0.)

def share(flags): return torch.as_tensor(flags).float().mean().item()
def trained(learn, *cbs):
    "One epoch in which nothing is learned"
    learn.fit(1, 0., wd=0., cbs=cbs)
    return learn

def watched(learn):
    cb = CatastrophicOverfitting(PGD(.1, steps=1), n=n)
    seen = []
    cb._collapsed = lambda acc: None
    class See(callback.EachEpoch):
        order = 99
        def each_epoch(self): seen.append(cb.best)
    trained(learn, cb, See())
    return seen[0]

def recorded(learn, path):
    trained(learn, RecordTrajectory(path, n=n, attack=None))
    p = np.exp(np.load(path/'epoch_0001.npz')['log_clean'].astype(float))
    return share(p > 1/len(learn.dls.vocab)) # of the first class it is sure

def drawn(learn):
    learn.show_adversarial('fgsm', max_n=n)
    titles = [ax.title.get_color() for ax in plt.gcf().axes if ax.images][::3]
    plt.close('all')
    return share([c == 'green' for c in titles])

places = dict(
    robustness = lambda l, _: l.robustness('clean', n=n).clean,
    robustness_pgd = lambda l, _: l.robustness('pgd2', n=n).pgd2,
    robustness_of_training = lambda l, _: l.robustness('clean', n=n, ds_idx=0).clean,
    metric = lambda l, _: (l.metrics.append(RobustAccuracy(PGD(steps=1), n=n)), l.validate()[-1])[1],
    teacher_check = lambda l, _: Teacher(l).check(l.dls, 'clean', n=n).clean,
    check_robustness = lambda l, _: l.check_robustness(n=n).n/n,
    curve = lambda l, _: l.robustness_curve((0,), 'fgsm', n=n).accuracy[0],
    plot = lambda l, _: l.plot_robustness_curve((0,.1), 'fgsm', n=n).lines[0].get_ydata()[0]/100,
    pictures = lambda l, _: drawn(l),
    interpretation = lambda l, _: (cm := AdversarialInterpretation.from_learner(l, 'fgsm', n=n)
                                   .confusion_matrix())[0,0]/cm.sum(),
    overfitting = lambda l, _: watched(l),
    trajectory = recorded,
    subset = lambda l, _: share(class_labels(with_subset(l.dls, n, n_valid=n).valid_ds) == 0),
    images = lambda l, _: share(pixel_data(l, n=n)[1] == 0))

@pytest.mark.parametrize('place', places)
def test_class_ordered_split(place, learn, tmp_path):
    "What is said of a sample is what is true of all images, to within one image"
    true = share(class_labels(learn.dls.valid_ds) == 0)
    assert abs(places[place](learn, tmp_path) - true) <= 1.001/n

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Images of noise in `train`, `valid` and `test`, of ten classes of unequal size"
    root = tmp_path_factory.mktemp('images')
    for seed,split in enumerate(('train','valid','test')):
        for i,(x,y) in enumerate(zip(*ordered(sizes[10], seed))):
            (root/split/f'c{y}').mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.stack([x]*3, -1)).save(root/split/f'c{y}'/f'{i}.png')
    return root

@pytest.fixture
def constant(monkeypatch):
    "Every network of a run or study answers the first class, before and after training"
    class Net(Always):
        def __init__(self, n_out):
            super().__init__(n_out)
            self.head.requires_grad_(False)
            self.scale = nn.Parameter(torch.ones(3))
        def forward(self, x): return super().forward(x[:,:1]) + 0*self.scale.sum()
    for module in ('run','cells'):
        monkeypatch.setattr(f'rkd_fastai.study.{module}.make_net', lambda arch, width, n_in, n_out: Net(n_out))

true = sizes[10][0]/sum(sizes[10])

def test_command_line(folder, constant, tmp_path, capsys):
    "The images that `rkd train` watches, and `rkd evaluate --n`"
    main(['train', '--data', str(folder), '--size', '8', '--epochs', '1', '--bs', '50', '--out', str(tmp_path/'run')])
    row, = csv.DictReader((tmp_path/'run/history.csv').read_text().splitlines())
    # all 150 are watched
    assert abs(float(row['robust_accuracy']) - true) <= 1/150 and abs(float(row['accuracy']) - true) < 1e-4
    main(['evaluate', str(tmp_path/'run'), '--attacks', 'clean,pgd2', '--n', str(n), '--json',
          str(tmp_path/'card.json')])
    card = json.loads((tmp_path/'card.json').read_text())
    assert abs(card['results']['pgd2']['accuracy'] - true) <= 1.001/n
    assert card['sample'] == dict(n=n, of=150, split='test', drawn='stratified by class', seed=42,
                                  images=card['sample']['images'])
    assert f'{n} of 150 test images, stratified by class, seed 42' in capsys.readouterr().out

def test_fewer_are_watched_than_there_are(folder, constant, tmp_path, monkeypatch):
    from rkd_fastai.cli import commands
    from rkd_fastai.study import run as runs
    monkeypatch.setattr(commands, 'fit_run', partial(runs.fit_run, n_valid=n))
    main(['train', '--data', str(folder), '--size', '8', '--epochs', '1', '--bs', '50', '--out', str(tmp_path/'run')])
    row, = csv.DictReader((tmp_path/'run/history.csv').read_text().splitlines())
    assert abs(float(row['robust_accuracy']) - true) <= 1.001/n

def test_study(folder, constant, tmp_path):
    "`n` and `n_autoattack`"
    spec = dict(data=str(folder), size=8, method='at', epochs=1, bs=50,
                measure=dict(attacks=['clean','pgd2','autoattack'], n=n, n_autoattack=12, best=False))
    study = Study(spec, tmp_path/'study')
    runner = Runner(study)
    c, = study.cells
    runner.train(c, 'training')
    assert study.missing(c) == {('last',n): ['clean','pgd2'], ('last',12): ['autoattack']}
    # which takes its images as AutoAttack does, and no minutes
    study.missing = lambda c: {('last',n): ['clean','pgd2'], ('last',12): ['fgsm']}
    runner.measure(c, 'measuring')
    found = study.results(c)['last']
    for name,k in (('clean',n), ('pgd2',n), ('fgsm',12)):
        assert found[name]['n'] == k and abs(found[name]['accuracy'] - true) <= 1.001/k
        assert found[name]['sample'] == dict(n=k, of=150, split='test', drawn='stratified by class', seed=0,
                                             images=found[name]['sample']['images'])

# --- the order that samples are prefixes of ---

@pytest.mark.parametrize('sizes', [(1,), (7,), (1,1,1), (90,30), (500,3,1), (100,)*10, (1,)*50])
def test_every_prefix_is_stratified(sizes):
    labels = np.repeat(range(len(sizes)), sizes)
    order = stratified_order(labels, 3)
    assert sorted(order) == [*range(len(labels))]
    for k in range(1, len(labels)+1):
        counts = np.bincount(labels[order[:k]], minlength=len(sizes))
        assert (abs(counts - k*np.array(sizes)/len(labels)) <= 1 + 1e-9).all()

def test_the_draw_is_that_of_its_seed_alone():
    "Written down once: it must not change with NumPy, with this library, or with anybody's random state"
    labels = np.repeat([0,1,2], [6,3,1])
    np.random.seed(5); random.seed(5); torch.manual_seed(5)
    states = np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()
    assert (stratified_order(labels).tolist() == [2, 8, 4, 1, 9, 6, 3, 0, 7, 5]
            and stratified_order(labels, -1).tolist() == stratified_order(labels, 2**32-1).tolist())
    assert states == (np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist())

def test_chance_of_each_image():
    "Over many seeds every image is drawn equally often, the first class's no earlier than the last's"
    labels = np.repeat(range(10), 10)
    first = np.array([stratified_order(labels, s)[:5] for s in range(2000)])
    of_class = np.bincount(labels[first].ravel(), minlength=10)
    assert abs(of_class - 1000).max() < 130 # four standard deviations

# --- where classes come from ---

class Opened(torch.utils.data.Dataset):
    "A data set of PyTorch that counts how often its images are opened"
    def __init__(self, x, y): self.x,self.y,self.opened = x,y,0
    def __len__(self): return len(self.y)
    def __getitem__(self, i): self.opened += 1; return self.x[i],self.y[i]

def test_labels_without_images(folder, monkeypatch):
    dls = ImageDataLoaders.from_folder(folder, train='train', valid='valid', bs=16, item_tfms=Resize(8), num_workers=0)
    with monkeypatch.context() as m:
        m.setattr(Image, 'open', lambda *a: pytest.fail('an image was opened'))
        labels = class_labels(dls.valid_ds)
    assert labels.tolist() == [int(dls.valid_ds[i][1]) for i in range(150)]
    x,y = torch.rand(20,1,8,8),torch.arange(20) % 4
    ds = Opened(x, y)
    # once, and remembered
    assert class_labels(ds).tolist() == y.tolist() == class_labels(ds).tolist() and ds.opened == 20
    ds.targets = y.tolist(); again = Opened(x, y); again.targets = y.tolist()
    assert class_labels(again).tolist() == y.tolist() and again.opened == 0
    assert class_labels(torch.utils.data.Subset(again, [3,1])).tolist() == [3,1] and again.opened == 0
    soft = Opened(x, torch.eye(4)[y])
    assert class_labels(soft).tolist() == y.tolist()

@pytest.fixture
def pytorchs(make_learner):
    "A Learner on loaders of PyTorch's own, as made by `make(ds)`"
    def build(make):
        x,y = ordered(sizes[2])
        ds = torch.utils.data.TensorDataset(torch.tensor(x).float()[:,None]/255, torch.tensor(y))
        dls = DataLoaders(make(ds), make(ds)); dls.vocab = [0,1]
        return make_learner(dls, Always(2), metrics=[RobustAccuracy(PGD(steps=1), n=n)])
    return build

class Stream(torch.utils.data.IterableDataset):
    def __init__(self, ds): self.ds = ds
    def __iter__(self): return iter(self.ds)
    def __len__(self): return len(self.ds)

loader = torch.utils.data.DataLoader
@pytest.mark.parametrize('make, true', [
    (lambda ds: loader(ds, 16), .75), (lambda ds: loader(ds, 16, shuffle=True), .75),
    (lambda ds: loader(Stream(ds), 16), .75),
    (lambda ds: loader(ds, 16, sampler=torch.utils.data.SubsetRandomSampler(range(60, 120))), .5),
    (lambda ds: loader(ds, 16, sampler=torch.utils.data.WeightedRandomSampler([1.]*90 + [3.]*30, 120)), .5)],
    ids=['in order', 'shuffled', 'stream', 'a part', 'weighted'])
def test_loaders_of_pytorch(make, true, pytorchs):
    "In what order they give images makes no difference; a sampler that names a part of a data set is heard"
    learn,error = pytorchs(make),.2 if make.__code__.co_names[-1] == 'WeightedRandomSampler' else 1.001/n
    assert abs(learn.robustness('clean', n=n).clean - true) <= error
    assert abs(learn.validate()[-1] - true) <= error

def test_a_loader_of_the_first_n_is_measured_on_them(make_learner):
    x,y = ordered(sizes[2])
    d = arrays_dls((x,y), (x,y), bs=16)
    few = type(d.valid)(d.valid_ds, bs=16, n=60, num_workers=0, after_item=d.valid.after_item,
                        after_batch=d.valid.after_batch)
    dls = DataLoaders(d.train, few); dls.vocab = [0,1]
    learn = make_learner(dls, Always(2), metrics=[RobustAccuracy(PGD(steps=1), n=20)])
    # the first 60 are of one class
    assert len(pixel_data(dls, few)[1]) == 60 and learn.robustness('clean').clean == 1. == learn.validate()[-1]

# --- what all places have in common ---

def test_more_than_there_are_means_all(learn, tmp_path):
    whole = learn.robustness('clean').clean
    learn.metrics = [accuracy, RobustAccuracy(PGD(steps=1), n=10**6)]
    assert (learn.robustness('clean', n=10**6).clean == whole
            and learn.validate()[2] == pytest.approx(learn.validate()[1]))
    assert (Teacher(learn).check(learn.dls, 'clean', n=10**6).sample.is_all
            and len(pixel_data(learn, n=10**6)[0]) == len(learn.dls[2].dataset))
    assert learn.robustness_curve((0,), 'fgsm', n=10**6).attrs['n'] == len(learn.dls[2].dataset)
    assert len(with_subset(learn.dls, n, n_valid=10**6).valid_ds) == len(learn.dls.valid_ds)
    trained(learn, RecordTrajectory(tmp_path, n=10**6, attack=None), CatastrophicOverfitting(PGD(.1), n=10**6))

@pytest.mark.parametrize('bad', [0, -3, 2.5, '7', True])
def test_numbers_that_are_none(bad, learn, tmp_path):
    "Said before anything is read, by the same words everywhere"
    for f in (lambda: learn.robustness('clean', n=bad), lambda: RobustAccuracy(n=bad),
              lambda: Teacher(learn).check(learn.dls, n=bad), lambda: learn.check_robustness(n=bad),
              lambda: learn.robustness_curve((0,), n=bad),
              lambda: AdversarialInterpretation.from_learner(learn, n=bad), lambda: CatastrophicOverfitting(n=bad),
              lambda: RecordTrajectory(tmp_path, n=bad), lambda: with_subset(learn.dls, n, n_valid=bad)):
        with pytest.raises((ValueError, TypeError), match='`n(_valid)?` must be'): f()

def test_the_metric_attacks_what_robustness_attacks(make_learner, make_dls, robust_net):
    "Also where the validation set is shuffled, weighted or in odd batches"
    fgsm = PGD(.1, steps=1, step_size=.1, random_start=False)
    dls = make_dls(n=64, n_valid=101, bs=7)
    for valid in (dls.valid, dls.valid.new(shuffle=True), dls.valid.new(bs=64)):
        d = DataLoaders(dls.train, valid, path=dls.path); d.vocab = dls.vocab
        learn = make_learner(d, robust_net, metrics=[RobustAccuracy(fgsm, n=k, seed=3) for k in (10,30,None)])
        assert learn.validate()[1:] == [pytest.approx(learn.robustness('fgsm', .1, n=k, seed=3).fgsm)
                                        for k in (10,30,None)]

def test_the_metric_attacks_full_batches(make_learner, make_dls, robust_net):
    seen = []
    class Note(PGD):
        def perturb(self, model, x, targ): seen.append(len(x)); return super().perturb(model, x, targ)
    learn = make_learner(make_dls(n=64, n_valid=100, bs=16), Always(10),
                         metrics=[RobustAccuracy(Note(.1, steps=1), n=40)])
    with torch.no_grad(): learn.model.head.weight.normal_() # some are right in every batch
    learn.validate()
    assert len(seen) <= 3 # 16, 16 and 8 images; were each validation batch attacked, there would be seven

def test_samples_are_nested_and_the_same_for_the_same_data(learn, make_learner):
    few,many = (measured_images(learn, n=k)[0] for k in (10,30))
    assert torch.equal(few, many[:10])
    again = make_learner(learn.dls, learn.model)
    random.seed(9); torch.manual_seed(9); np.random.seed(9)
    assert torch.equal(measured_images(again, n=30)[0], many)
    assert not torch.equal(measured_images(learn, n=30, seed=1)[0], many)

def test_the_sample_is_that_of_the_files_in_whatever_order_they_were_listed(folder):
    files = sorted(get_image_files(folder))
    dls = ImageDataLoaders.from_path_func(folder, files, lambda f: Path(f).parent.name, valid_pct=.1, seed=0, bs=8,
                                          num_workers=0, item_tfms=Resize(8))
    def drawn(order):
        dl = dls.test_dl(order, with_labels=True, num_workers=0)
        return {Path(dl.dataset.items[i]).relative_to(folder) for i in measured_positions(dl, 12)[0]}
    assert len(drawn(files)) == 12 and drawn(files) == drawn(files[::-1]) == drawn(files[1::2] + files[::2])

def test_results_of_other_images_are_not_compared(learn):
    a,b,c = (learn.robustness('clean', **kw) for kw in (dict(n=n), dict(n=n, seed=1), dict(n=n, ds_idx=1)))
    assert Robustness.compare([a, learn.robustness('clean', n=n)]).clean.nunique() == 1
    with pytest.raises(ValueError, match='seed 1'): Robustness.compare([a, b])
    with pytest.raises(ValueError, match='validation images'): Robustness.compare([a, c])

def test_a_state_of_another_sample(learn, tmp_path):
    args = dict(attacks=('clean','pgd1'), state_path=tmp_path/'state.json')
    learn.robustness(n=n, **args)
    with pytest.raises(ValueError, match=rf"sample is '{n} of .* seed 0' in the file and '20 of .* seed 0' here"):
        learn.robustness(n=20, **args)
    with pytest.raises(ValueError, match="test images.* in the file and .*validation images"):
        learn.robustness(n=n, ds_idx=1, **args)

# --- splits of folders ---

def test_three_folders(folder):
    dls = make_dls(str(folder), bs=10, size=8)
    assert [{f.relative_to(folder).parts[0] for f in dl.dataset.items}
            for dl in dls.loaders] == [{'train'},{'valid'},{'test'}]
    assert [len(dl.dataset) for dl in dls.loaders] == [150]*3 and [*dls.vocab] == [f'c{i}' for i in range(10)]

def folders(root, **splits):
    for split,classes in splits.items():
        for c in classes:
            (root/split/c).mkdir(parents=True)
            for i in range(10): Image.fromarray(np.full((8,8,3), 20*i, np.uint8)).save(root/split/c/f'{i}.png')
    return str(root)

def test_test_images_choose_no_epoch(tmp_path):
    "With `train` and `test`, a fifth of each training class is held out"
    dls = make_dls(folders(tmp_path, train='ab', test='ab'), bs=4, size=8)
    assert [len(dl.dataset) for dl in dls.loaders] == [16,4,20]
    assert (np.bincount(class_labels(dls.valid_ds)).tolist() == [2,2]
            and {f.parts[-3] for f in dls.valid_ds.items} == {'train'})
    assert not {*dls.valid_ds.items} & {*dls.train_ds.items}

def test_val_is_valid(tmp_path):
    dls = make_dls(folders(tmp_path, train='ab', val='ab'), bs=4, size=8)
    assert len(dls.loaders) == 2 and {f.parts[-3] for f in dls.valid_ds.items} == {'val'}

@pytest.mark.parametrize('splits, says', [
    (dict(train='ab', test='abc'), "class 'c', which the training images lack"), (dict(test='ab'), 'no `train`'),
    (dict(train='ab', valid='ab', val='ab'), 'both'), (dict(train='a'), 'one class')])
def test_folders_that_mean_nothing(splits, says, tmp_path):
    with pytest.raises(ValueError, match=says): make_dls(folders(tmp_path, **splits), bs=4, size=8)

def test_test_images_without_labels(tmp_path):
    root = folders(tmp_path, train='ab')
    (tmp_path/'test').mkdir(); Image.new('RGB', (8,8)).save(tmp_path/'test/0.png')
    with pytest.warns(UserWarning, match='no labels'): assert len(make_dls(root, bs=4, size=8).loaders) == 2
    Image.new('RGB', (8,8)).save(tmp_path/'train/0.png')
    with pytest.raises(ValueError, match='not in a sub-folder'), pytest.warns(UserWarning): make_dls(root, bs=4, size=8)

def test_a_folder_is_split_alike_everywhere(tmp_path, monkeypatch):
    "Whatever order a file system lists its files in"
    import os
    root = folders(tmp_path, train='ab', test='ab')
    a = make_dls(root, bs=4, size=8)
    walk = os.walk
    def backwards(*args, **kwargs):
        for p,d,f in walk(*args, **kwargs): d.sort(reverse=True); yield p,d,sorted(f, reverse=True)
    monkeypatch.setattr(os, 'walk', backwards)
    b = make_dls(root, bs=4, size=8)
    for x,y in zip(a.loaders, b.loaders): assert [*x.dataset.items] == [*y.dataset.items]

def test_evaluating_what_was_trained_on(tmp_path, constant):
    "A folder without a test split that has changed is not split as it was"
    root = tmp_path/'images'
    for split in (Path(folders(root, x='ab'))/'x').iterdir(): split.rename(root/split.name)
    (root/'x').rmdir()
    main(['train', '--data', str(root), '--size', '8', '--epochs', '1', '--bs', '8', '--out', str(tmp_path/'run')])
    main(['evaluate', str(tmp_path/'run'), '--attacks', 'clean'])
    Image.new('RGB', (8,8)).save(root/'a/another.png')
    with pytest.raises(SystemExit, match='not those that were held out'):
        main(['evaluate', str(tmp_path/'run'), '--attacks', 'clean'])

# PIL leaves the file to the collector
@pytest.mark.filterwarnings('ignore::ResourceWarning', 'ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_truncated_image_is_named(folder, constant, tmp_path):
    import shutil
    root = shutil.copytree(folder, tmp_path/'images')
    bad = root/'train/c2/50.png'
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(SystemExit, match='c2/50.png` cannot be read'):
        main(['train', '--data', str(root), '--size', '8', '--epochs', '1', '--bs', '50', '--out', str(tmp_path/'run')])
