"""Trajectories: what is recorded is what plain PyTorch finds, recording changes no bit of the training, kills leave
no trace, and Eq. 8 and the pictures against loops."""
import copy, json, random

import matplotlib.pyplot as plt, numpy as np, pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.vision.all import Callback, CancelEpochException, TensorImage, Transform, load_learner, set_seed
from conftest import python

from rkd_fastai.all import *
from rkd_fastai.evaluation.trajectories import Trajectory, cosine, difficulty, easiest_hardest, smooth
from rkd_fastai.sampling import sample_positions
from rkd_fastai.callback.core import EachEpoch
from rkd_fastai.core import digest

STILL = PGD(.1, steps=2, random_start=False)
RANDOM = PGD(.1, steps=1)

class Keep(EachEpoch):
    "The network after each epoch"
    order, only_shows = 60, True
    def __init__(self): self.at = []
    def each_epoch(self): self.at.append(copy.deepcopy(self.model).eval())
class Die(Callback):
    "A power cut in epoch `epoch` at `event`; as no part of the training"
    only_shows = True
    def __init__(self, event, epoch, order=900):
        self.order = order
        def interrupt():
            if self.learn.epoch == epoch and not self.learn.lock.locked(): raise KeyboardInterrupt
        setattr(self, event, interrupt)
class Doubles(nn.Module):
    "`net` with logits `k` times as large"
    def __init__(self, net, k): super().__init__(); self.net,self.k = net,k
    def forward(self, x): return self.k*self.net(x)

def files(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
def epoch(folder, k):
    with np.load(folder/f'epoch_{k:04d}.npz', allow_pickle=False) as f: return {name: f[name] for name in f}
def pixels(dl): # a data set's items, one by one
    xs,ys = zip(*[(x, int(y)) for x,y in dl.dataset])
    return torch.stack([x.as_subclass(torch.Tensor).float()/255 for x in xs]), torch.tensor(ys)

@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    plt.close('all')

@pytest.fixture
def make(make_learner, make_dls, tiny_net):
    "Factory of Learners, always the same"
    def make(*cbs, seed=0, net=None, dls=None, **kwargs):
        set_seed(seed)
        return make_learner(make_dls(n=96, n_valid=40) if dls is None else dls,
                            tiny_net(seed=seed, dropout=.3) if net is None else net, cbs=list(cbs), **kwargs)
    return make

# --- what is recorded ---

@pytest.mark.parametrize('n', [None, 17])
@pytest.mark.parametrize('stats', [None, ([.5], [.25])], ids=['pixels', 'normalised'])
def test_recorded_is_what_plain_pytorch_finds(n, stats, make, make_dls, tmp_path):
    """Log-probabilities and mean entropies of each epoch's network, and Eq. 8 by a loop over `cross_entropy`, all in
    float64"""
    rec,keep = RecordTrajectory(tmp_path/'t', n=n, attack=STILL, bs=7),Keep()
    learn = make(rec, keep, dls=make_dls(n=96, n_valid=40, stats=stats))
    learn.fit(3, .01)
    x,y = pixels(learn.dls.valid)
    idx = sample_positions(y, n)
    x,y = x[idx],y[idx]
    m,s = (torch.tensor(o).view(1,-1,1,1) for o in stats or ([0.], [1.]))
    t,S = load_trajectory(tmp_path/'t'),dict(clean=torch.zeros(len(x)).double(), adv=torch.zeros(len(x)).double())
    for k,net in enumerate(keep.at):
        f = lambda x: net((x-m)/s)
        for kind,images in (('clean', x), ('adv', STILL(f, x, y))):
            with torch.no_grad(): logits = f(images).double()
            p,ce = logits.softmax(1),F.cross_entropy(logits, y, reduction='none')
            S[kind] += ce/3
            ours = epoch(tmp_path/'t', k+1)
            stored,entropy = ((ours['log_clean'], ours['entropy']) if kind == 'clean'
                              else (ours['log_adv'], ours['entropy_adv']))
            assert stored.dtype == np.float16
            np.testing.assert_allclose(stored.astype(float), -ce.numpy(), rtol=2**-10, atol=1e-6)
            np.testing.assert_allclose(t.probs(kind)[k], p[range(len(y)), y].numpy(), atol=3e-4)
            want = -(p*p.log()).sum(1).mean().item()
            np.testing.assert_allclose(entropy, want, rtol=1e-5)
            assert (t.entropy if kind == 'clean' else t.entropy_adv)[k] == entropy
    for kind in S: np.testing.assert_allclose(difficulty(t.probs(kind)), S[kind].numpy(), rtol=2**-10, atol=1e-6)
    assert (t.epochs == 3 and t.n == len(x) and t.clean.dtype == t.adv.dtype == np.float32
            and (S['adv'] > S['clean']).all())

@pytest.mark.parametrize('k', [.01, 100., 3000., 1e6])
def test_both_ends_of_float16(k, make, tiny_net, tmp_path):
    "Probabilities next to 0 and to 1 keep their order, and none is lost"
    rec,keep = RecordTrajectory(tmp_path/'t', attack=None),Keep()
    learn = make(rec, keep, net=Doubles(tiny_net(), k))
    learn.fit(1, 0.)
    x,y = pixels(learn.dls.valid)
    with torch.no_grad(): ce = F.cross_entropy(keep.at[0](x).double(), y, reduction='none').numpy()
    if k > 1: assert ce.min() < 2.**-11 and ce.max() > 17 # as probabilities in float16: 1 and 0
    stored = epoch(tmp_path/'t', 1)['log_clean'].astype(float)
    np.testing.assert_allclose(stored, -np.minimum(ce, 65504), rtol=2**-10, atol=2**-24) # its largest number
    S = difficulty(load_trajectory(tmp_path/'t').clean)
    assert np.isfinite(S).all()
    np.testing.assert_allclose(S, np.minimum(ce, 126*np.log(2)), rtol=2**-10, atol=2**-23)

def test_without_attack(make, tmp_path):
    make(RecordTrajectory(tmp_path/'t', attack=None)).fit(2)
    t = load_trajectory(tmp_path/'t')
    assert (t.adv is None and t.entropy_adv is None and t.card['attack'] is None
            and list(epoch(tmp_path/'t', 2)) == ['log_clean', 'entropy'])
    with pytest.raises(ValueError, match='without an attack'): t.probs('adv')

def test_card(make, tmp_path):
    learn = make(RecordTrajectory(tmp_path/'t', n=20, attack=PGD(8/255), seed=3))
    learn.fit(1)
    card = json.loads((tmp_path/'t/card.json').read_text())
    assert ({k: card[k] for k in ('n', 'attack', 'seed')} == dict(n=20, attack=repr(PGD(8/255)), seed=3)
            and set(card['versions']) == {'rkd_fastai', 'fastai', 'torch'})
    y = pixels(learn.dls.valid)[1]
    y = y[sample_positions(y, 20, seed=3)]
    assert card['sample'] == dict(n=20, of=40, split='valid', drawn='stratified by class', seed=3,
                                  images=card['sample']['images'])
    assert card['labels'] == digest([y]) != digest([y.flip(0)])
    assert (load_trajectory(tmp_path/'t').card == card
            and '20 images over 1 epoch,' in repr(load_trajectory(tmp_path/'t')))

class Darkens(Transform):
    "An augmentation, of training images only"
    order, split_idx = 20, 0
    def encodes(self, x: TensorImage): return x*random.random()*np.random.rand()

@pytest.mark.parametrize('resident', [False, True])
def test_training_set(resident, make, make_dls, tmp_path):
    "In its order, all of it, not augmented, and shuffled and augmented for the training as before"
    def dls():
        set_seed(0)
        return make_dls(n=90, batch_tfms=[PadCropFlip(2), Darkens()], device_resident=resident)
    keep,data = Keep(),dls()
    learn = make(RecordTrajectory(tmp_path/'t', data.train, attack=STILL), keep, dls=data)
    learn.fit(2, .01)
    x,y = pixels(learn.dls.train)
    assert load_trajectory(tmp_path/'t').n == 90 and learn.dls.train_ds.split_idx == 0
    for k,net in enumerate(keep.at):
        for name,images in (('log_clean', x), ('log_adv', STILL(net, x, y))):
            with torch.no_grad(): want = -F.cross_entropy(net(images).double(), y, reduction='none')
            np.testing.assert_allclose(epoch(tmp_path/'t', k+1)[name].astype(float), want, rtol=2**-10, atol=1e-6)
    plain = make(dls=dls())
    plain.fit(2, .01)
    assert all(torch.equal(a, b) for a,b in zip(plain.model.state_dict().values(), learn.model.state_dict().values()))

def test_loader_of_pytorch(make, digits, tmp_path):
    "A shuffled one gives the same images in the same order each time"
    data = torch.utils.data.DataLoader(list(zip(digits.x[:60], digits.y[:60])), batch_size=16, shuffle=True)
    for name,seed in (('a', 0), ('b', 5)): make(RecordTrajectory(tmp_path/name, data, attack=RANDOM), seed=seed).fit(1)
    assert load_trajectory(tmp_path/'a').card == load_trajectory(tmp_path/'b').card

# --- it only looks ---

@pytest.mark.parametrize('attack', [None, RANDOM, PGD(.1, steps=1, restarts=2)], ids=repr)
def test_recording_changes_not_one_bit(attack, make, tmp_path):
    def train(*cbs):
        learn = make(AdversarialTraining(RANDOM), WeightAveraging(.9), *cbs)
        learn.fit(2, .01)
        return learn, (torch.get_rng_state(), random.getstate(), np.random.get_state(), learn.dls.train.rng.getstate(),
                       learn.dls.valid.rng.getstate())
    (plain,a),(seen,b) = train(),train(RecordTrajectory(tmp_path/'t', attack=attack, seed=7))
    for k,v in plain.model.state_dict().items(): assert torch.equal(v, seen.model.state_dict()[k])
    assert torch.equal(a[0], b[0]) and a[1] == b[1] and (a[2][1] == b[2][1]).all() and a[3:] == b[3:]
    assert ([m.training for m in plain.model.modules()] == [m.training for m in seen.model.modules()]
            and all(p.requires_grad for p in seen.model.parameters()))
    assert [list(v) for v in plain.recorder.values] == [list(v) for v in seen.recorder.values]
    for p,q in zip(plain.model.parameters(), seen.model.parameters()): assert torch.equal(p.grad, q.grad)

def test_same_noise_after_every_epoch(make, tmp_path):
    "A network that stands still is seen to: its random starts are the same, and others for another seed"
    for name,seed in (('a', 0), ('b', 1)):
        torch.manual_seed(0)
        make(RecordTrajectory(tmp_path/name, attack=PGD(.1, steps=0), seed=seed),
             net=nn.Sequential(nn.Flatten(), nn.Linear(64, 10))).fit(2, 0.)
    a,b = load_trajectory(tmp_path/'a'),load_trajectory(tmp_path/'b')
    assert ((a.adv[0] == a.adv[1]).all() and (a.clean == b.clean).all() and (a.adv != b.adv).any()
            and (a.adv != a.clean).any())

def test_only_epochs_of_training(make, tmp_path):
    learn = make(RecordTrajectory(tmp_path/'t', attack=None))
    learn.validate(); learn.get_preds()
    assert not (tmp_path/'t').exists()
    learn.fit(2)
    before = files(tmp_path/'t')
    learn.validate(); learn.get_preds()
    assert files(tmp_path/'t') == before and learn.record_trajectory.data is None

def test_epoch_that_is_cut_short(make, tmp_path):
    "Counts as one, and its network is looked at in eval mode, which no validation has put it in"
    class Cuts(Callback):
        def after_batch(self):
            if self.learn.training: raise CancelEpochException
    keep = Keep()
    learn = make(RecordTrajectory(tmp_path/'t', attack=STILL), Cuts(), keep)
    learn.fit(2, .05)
    x,y = pixels(learn.dls.valid)
    for k,net in enumerate(keep.at):
        for name,images in (('log_clean', x), ('log_adv', STILL(net, x, y))):
            with torch.no_grad(): want = -F.cross_entropy(net(images).double(), y, reduction='none')
            np.testing.assert_allclose(epoch(tmp_path/'t', k+1)[name].astype(float), want, rtol=2**-10, atol=1e-6)
    assert load_trajectory(tmp_path/'t').epochs == 2

@pytest.mark.filterwarnings('ignore:.*numpy.core is deprecated') # fastai's `learn.load`, which ends `lr_find`
def test_lr_find_is_not_recorded(make, tmp_path):
    learn = make(RecordTrajectory(tmp_path/'t', attack=None))
    learn.lr_find(show_plot=False, num_it=5)
    assert not (tmp_path/'t').exists()

def test_the_average_is_recorded(make, tmp_path):
    "The network that is validated"
    keep = Keep()
    learn = make(WeightAveraging(.9), RecordTrajectory(tmp_path/'t', attack=None), keep)
    learn.fit(2, .05)
    x,y = pixels(learn.dls.valid)
    with torch.no_grad(): want = -F.cross_entropy(learn.model(x).double(), y, reduction='none')
    np.testing.assert_allclose(epoch(tmp_path/'t', 2)['log_clean'].astype(float), want, rtol=2**-10, atol=1e-6)

def test_its_attack_is_not_the_training_attack(make, tmp_path):
    "`CatastrophicOverfitting` takes its radius from the training"
    learn = make(RecordTrajectory(tmp_path/'t', attack=PGD(.3, steps=1)), AdversarialTraining(PGD(.05, steps=1)),
                 CatastrophicOverfitting(n=8))
    learn.fit(1)
    assert learn.catastrophic_overfitting._watched.eps == .05

def test_export(make, tmp_path):
    "Neither images nor loader go into it, and nothing of this library is needed to predict"
    learn = make()
    learn.add_cb(RecordTrajectory(tmp_path/'t', learn.dls.train, attack=None))
    learn.fit(1)
    learn.export(tmp_path/'learn.pkl')
    with pytest.warns(UserWarning, match='load_learner'): back = load_learner(tmp_path/'learn.pkl')
    assert back.record_trajectory.dl is None and back.record_trajectory.data is None

# --- killed and resumed ---

def record(make, folder, *cbs, run=None, seed=0, n_epoch=4, **kwargs):
    learn = make(RecordTrajectory(folder, n=20, attack=RANDOM), AdversarialTraining(RANDOM), *cbs,
                 *([Resume(run, kwargs.pop('every', None))] if run else []), seed=seed, **kwargs)
    learn.fit(n_epoch, .01)

@pytest.mark.few(5)
@pytest.mark.parametrize('every', [None, 1])
@pytest.mark.parametrize('event,at,order', [('after_epoch', 0, 900), ('after_epoch', 0, 40), ('after_epoch', 2, 900),
                                            ('after_epoch', 1, 2000), ('after_batch', 2, 2000),
                                            ('before_train', 1, 0), ('before_validate', 3, 0), ('after_fit', 3, 900)])
def test_killed_and_resumed(event, at, order, every, make, tmp_path):
    """The same files as without a kill, before and after an epoch is written and `Resume` knows of it, from another
    network and other random numbers"""
    record(make, tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt):
        record(make, tmp_path/'killed', Die(event, at, order), run=tmp_path/'r.pth', every=every)
    seed = 99 if (tmp_path/'r.pth').exists() else 0 # of a run that was not kept nothing is known but its seed
    record(make, tmp_path/'killed', run=tmp_path/'r.pth', seed=seed)
    assert files(tmp_path/'killed') == files(tmp_path/'whole') and len(files(tmp_path/'whole')) == 5

def test_killed_while_writing(make, tmp_path, monkeypatch):
    record(make, tmp_path/'whole')
    savez,calls = np.savez,[]
    def dies(f, **arrays):
        calls.append(1)
        if len(calls) == 3: f.write(b'half'); raise KeyboardInterrupt
        savez(f, **arrays)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(np, 'savez', dies)
        record(make, tmp_path/'killed', run=tmp_path/'r.pth')
    assert load_trajectory(tmp_path/'killed').epochs == 2
    record(make, tmp_path/'killed', run=tmp_path/'r.pth')
    assert files(tmp_path/'killed') == files(tmp_path/'whole')

def test_epochs_beyond_the_resumed_one_are_recorded_again(make, tmp_path):
    "`Resume` goes on from an older file than the last"
    with pytest.raises(KeyboardInterrupt): record(make, tmp_path/'t', Die('before_train', 1), run=tmp_path/'r.pth')
    kept = (tmp_path/'r.pth').read_bytes()
    record(make, tmp_path/'t', run=tmp_path/'r.pth')
    whole = files(tmp_path/'t')
    for name in ('epoch_0003.npz', 'epoch_0004.npz'): (tmp_path/'t'/name).write_bytes(b'stale')
    (tmp_path/'r.pth').write_bytes(kept)
    with pytest.raises(KeyboardInterrupt): record(make, tmp_path/'t', Die('after_batch', 1), run=tmp_path/'r.pth')
    assert load_trajectory(tmp_path/'t').epochs == 1 # gone as soon as the training goes on
    record(make, tmp_path/'t', run=tmp_path/'r.pth')
    assert files(tmp_path/'t') == whole

def test_another_training_is_refused(make, tmp_path):
    record(make, tmp_path/'t', n_epoch=3)
    before = files(tmp_path/'t')
    for seed in (0, 1):
        with pytest.raises(ValueError, match='`path`.* contains 3 epochs of another training.*or delete this one'):
            record(make, tmp_path/'t', seed=seed)
        with pytest.raises(ValueError, match='`path`.* contains 3 epochs of another training.*or delete this one'):
            record(make, tmp_path/'t', seed=seed, run=tmp_path/f'{seed}.pth')
    assert files(tmp_path/'t') == before

@pytest.mark.parametrize('how,message', [
    (dict(n=19), 'with n 20, not 19: .*or delete this one'), (dict(seed=1), 'with seed 0, not 1'),
    (dict(attack=None), 'with attack PGD.*not None'), (dict(attack=PGD(.2, steps=1)), 'with attack PGD'),
    (dict(lost='epoch_0001.npz'), 'lacks epoch 1 of the 2'),
    (dict(lost='card.json'), 'no readable `card.json`.*or delete this one'),
    (dict(dl=True), 'with labels')])
def test_resumed_with_other_settings(how, message, make, tmp_path):
    with pytest.raises(KeyboardInterrupt): record(make, tmp_path/'t', Die('before_train', 2), run=tmp_path/'r.pth')
    how = dict(how)
    if lost := how.pop('lost', None): (tmp_path/'t'/lost).unlink()
    before = files(tmp_path/'t')
    learn = make(AdversarialTraining(RANDOM), Resume(tmp_path/'r.pth'))
    if how.pop('dl', None): how['dl'] = learn.dls.train
    learn.add_cb(RecordTrajectory(tmp_path/'t', **dict(n=20, attack=RANDOM) | how))
    with pytest.raises(ValueError, match=f'`path`.*{message}'): learn.fit(4, .01)
    assert files(tmp_path/'t') == before

def test_recording_starts_with_the_training(make, tmp_path):
    "Not in the middle of one: what Eq. 8 adds up would be lost"
    with pytest.raises(KeyboardInterrupt): make(Resume(tmp_path/'r.pth'), Die('before_train', 2)).fit(4)
    with pytest.raises(ValueError, match='`path`.*lacks epoch 1 of the 2'):
        make(RecordTrajectory(tmp_path/'t'), Resume(tmp_path/'r.pth')).fit(4)
    assert not (tmp_path/'t').exists()

def test_further_fits_go_on_counting(make, tmp_path):
    learn = make(RecordTrajectory(tmp_path/'t', attack=None))
    learn.fine_tune(2)
    assert load_trajectory(tmp_path/'t').epochs == 3
    learn.fit(1)
    t = load_trajectory(tmp_path/'t')
    assert t.epochs == 4 and len(np.unique(t.clean[:,0])) == 4
    make(RecordTrajectory(tmp_path/'t', attack=None)).fit(6, start_epoch=4) # by hand
    assert load_trajectory(tmp_path/'t').epochs == 6

def test_one_epoch_is_overwritten(make, tmp_path):
    make(RecordTrajectory(tmp_path/'t', attack=None)).fit(1, .1)
    make(RecordTrajectory(tmp_path/'t', n=9), seed=1).fit(2)
    t = load_trajectory(tmp_path/'t')
    assert t.epochs == 2 and t.n == 9

# --- bad input of the callback ---

@pytest.mark.parametrize('kw,message', [(dict(n=0), '`n`'), (dict(bs=0), '`bs`'), (dict(dl=[]), '`dl` is empty')])
def test_bad_recorder(kw, message, make, tmp_path):
    with pytest.raises(ValueError, match=message): make(RecordTrajectory(tmp_path/'t', **kw)).fit(1)
    assert not (tmp_path/'t').exists()

def test_bad_folders_networks_and_loaders(make, make_dls, tiny_net, tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(ValueError, match='`path`.*is a file'): RecordTrajectory(tmp_path/'file')
    with pytest.raises(TypeError, match='`attack`'): RecordTrajectory(tmp_path/'t', attack='pgd')
    with pytest.raises(ValueError, match='`path`.*two callbacks'):
        make(RecordTrajectory(tmp_path/'t'), RecordTrajectory(tmp_path/'t')).fit(1)
    with pytest.raises(ValueError, match='`dl` contains classes 0 to 9, but the network has 3'):
        make(RecordTrajectory(tmp_path/'t', make_dls().valid), net=tiny_net(n_out=3),
             dls=make_dls(n=30, n_valid=12, n_classes=3, bs=10)).fit(1)
    assert not (tmp_path/'t').exists()
    learn = make(RecordTrajectory(tmp_path/'t', attack=None))
    with pytest.raises(ValueError, match='NaN or infinite'): learn.fit(1, float('nan'))
    assert [p.name for p in (tmp_path/'t').iterdir()] == ['card.json']

# --- reading ---

@pytest.fixture
def folder(make, tmp_path):
    make(RecordTrajectory(tmp_path/'t', n=20, attack=RANDOM)).fit(3, .01)
    return tmp_path/'t'

def rewrite(folder, k=2, **arrays): np.savez(folder/f'epoch_{k:04d}.npz', **epoch(folder, k) | arrays)
damages = dict(
    lost=(lambda f: (f/'epoch_0002.npz').unlink(), '`folder`.*lacks epoch 2 of 3'),
    first=(lambda f: (f/'epoch_0001.npz').unlink(), 'lacks epoch 1'),
    none=(lambda f: [p.unlink() for p in f.glob('*.npz')], 'contains no epoch'),
    no_card=(lambda f: (f/'card.json').unlink(), 'has no `card.json`'),
    card=(lambda f: (f/'card.json').write_text('{'), 'card.json` is damaged'),
    old_card=(lambda f: (f/'card.json').write_text('{"n": 20}'), 'card.json` is damaged'),
    empty=(lambda f: (f/'epoch_0002.npz').write_bytes(b''), 'epoch_0002.npz` is damaged'),
    cut=(lambda f: (f/'epoch_0002.npz').write_bytes((f/'epoch_0002.npz').read_bytes()[:-40]),
         'epoch_0002.npz` is damaged'),
    flipped=(lambda f: (f/'epoch_0002.npz').write_bytes((b := (f/'epoch_0002.npz').read_bytes())[:180]
                                                        + bytes([b[180]^255]) + b[181:]), 'epoch_0002.npz` is damaged'),
    pickled=(lambda f: rewrite(f, log_clean=np.array([{}]*20)), 'epoch_0002.npz` is damaged'),
    clean_only=(lambda f: np.savez(f/'epoch_0002.npz', log_clean=np.zeros(20), entropy=0.),
                'epoch_0002.npz` is damaged'),
    fewer=(lambda f: rewrite(f, log_adv=np.zeros(19)), 'epoch_0002.npz`: `log_adv` is float64 .19,.* 20 images'),
    ints=(lambda f: rewrite(f, log_clean=np.zeros(20, int)), '`log_clean` is int64'),
    each=(lambda f: rewrite(f, entropy=np.zeros(20)), '`entropy` is float64'),
    nan=(lambda f: rewrite(f, log_clean=np.full(20, np.nan)), '`clean` contains NaN'),
    positive=(lambda f: rewrite(f, log_clean=np.ones(20)), r'`clean` must be probabilities in \[0, 1\]'))

@pytest.mark.parametrize('what', damages)
def test_damaged(what, folder):
    damage,message = damages[what]
    assert load_trajectory(folder).epochs == 3
    damage(folder)
    with pytest.raises(ValueError, match=message): load_trajectory(folder)

def test_what_does_not_belong_there(folder):
    (folder/'notes.txt').touch(); (folder/'epoch_best.npz').touch(); (folder/'.epoch_0004.npz.77.tmp').touch()
    assert load_trajectory(folder).epochs == 3
    with pytest.raises(ValueError, match='has no `card.json`'): load_trajectory(folder/'nowhere')

def test_no_fastai_is_needed():
    assert python('''
        import sys
        class Blocked:
            def find_spec(self, name, *_):
                if name.split('.')[0] in ('fastai', 'fastcore', 'torch', 'pandas'):
                    raise ImportError(f'{name} is blocked')
        sys.meta_path.insert(0, Blocked())
        from rkd_fastai.evaluation.trajectories import *
        print(Trajectory([[.5, 1.]]))
    ''') == 'Trajectory of 2 images over 1 epoch'

# --- Eq. 8, similarity, smoothing ---

def test_difficulty_of_zeros_and_ones():
    floor = 126*np.log(2) # the smallest normal float32 is 2⁻¹²⁶
    for p in (0., 1e-300, 1e-45, 2.**-126): np.testing.assert_allclose(difficulty([[p, 1], [1, 1]]), [floor/2, 0])
    np.testing.assert_allclose(difficulty(np.float16([[6e-8]])), 24*np.log(2))
    assert difficulty(torch.rand(3, 5)).dtype == np.float64

@pytest.mark.parametrize('Kt,Ks', [(6, 6), (6, 4), (3, 6), (1, 5)])
def test_cosine_against_a_loop(Kt, Ks):
    rng = np.random.default_rng(0)
    p_t,p_s = rng.random((Kt, 50)),rng.random((Ks, 50))**4
    K = min(Kt, Ks)
    want = [F.cosine_similarity(torch.tensor(p_t[:K,i]), torch.tensor(p_s[:K,i]), dim=0).item() for i in range(50)]
    np.testing.assert_allclose(cosine(p_t, p_s), want, rtol=1e-6)
    np.testing.assert_allclose(cosine(p_t, p_t), 1); np.testing.assert_allclose(cosine(p_t, .3*p_t), 1)

def test_cosine_at_the_ends():
    assert cosine([[0.],[0.]], [[1.],[0.]])[0] == 0 and cosine([[1.],[0.]], [[0.],[1.]])[0] == 0
    tiny = np.full((3,1), 1e-30)
    np.testing.assert_allclose(cosine(tiny, tiny), 1)
    assert cosine(np.full((7,9), .1), np.full((7,9), .3)).max() <= 1

@pytest.mark.parametrize('n', [1, 2, 5, 40])
@pytest.mark.parametrize('width', [1, 3, 9, 101])
def test_smooth_against_a_loop(n, width):
    v = np.random.default_rng(1).random(n) + 1e4
    def at(i):
        h = min(width//2, i, n-1-i)
        return v[i-h:i+h+1].mean()
    np.testing.assert_allclose(smooth(v, width), [at(i) for i in range(n)], rtol=1e-12)
    np.testing.assert_allclose(smooth(np.arange(n), width), np.arange(n), atol=1e-9)

@pytest.mark.parametrize('f,message', [
    (lambda: difficulty([.5, .5]), '`p` must have 2'), (lambda: difficulty([[1.1]]), r'`p` must be probabilities'),
    (lambda: difficulty([[-.1]]), '`p` must be'), (lambda: difficulty([[np.nan]]), '`p` contains NaN'),
    (lambda: difficulty('p'), '`p` must be an array of numbers'),
    (lambda: difficulty(np.zeros((0, 4))), '`p` is empty'),
    (lambda: cosine([[1.]], [[1., 1.]]), '`p_t` has 1 image, but `p_s` has 2'),
    (lambda: smooth([1, 2], 2), '`width` must be odd'), (lambda: smooth([1, 2], 0), '`width`'),
    (lambda: smooth([1, 2], -1), '`width`'), (lambda: smooth([1, 2], 1.5), '`width`'),
    (lambda: smooth([1, np.inf], 1), '`values`'),
    (lambda: Trajectory([[.5, .5]], adv=[[.5]]), '`adv` must have the shape'),
    (lambda: Trajectory([[.5]], entropy=[1., 2.]), '`entropy` must have the shape'),
    (lambda: Trajectory([[.5]], entropy=1.), '`entropy` must have 1'),
    (lambda: Trajectory([[.5]]).until(0), '`epoch` must be from 1 to 1'),
    (lambda: Trajectory([[.5]]).until(2), '`epoch`'), (lambda: Trajectory([[.5]]).probs('x'), '`kind`')])
def test_bad_numbers(f, message):
    with pytest.raises(ValueError, match=message): f()

def test_until():
    p = np.random.default_rng(0).random((4, 3))
    t = Trajectory(p, p/2, p[:,0], p[:,1], dict(labels='a')).until(3)
    assert t.epochs == 3 and t.card == dict(labels='a') and t.entropy_adv is not None
    np.testing.assert_allclose(t.adv, p[:3]/2, rtol=1e-6); np.testing.assert_allclose(t.entropy, p[:3,0])
    assert Trajectory(p).until(2).adv is None

# --- the pictures ---

@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    made = lambda K, labels='a': Trajectory(*rng.random((2, K, 60)), *rng.random((2, K)), dict(labels=labels))
    return made(6), made(5), made(6, 'b')

def test_entropy_curves(pair):
    t,s,_ = pair
    for kind,want in (('clean', [t.entropy, s.entropy]), ('adv', [t.entropy_adv, s.entropy_adv])):
        ax = plot_entropy(dict(teacher=t, student=s), kind)
        for line,v in zip(ax.lines, want):
            assert line.get_xdata().tolist() == list(range(1, len(v)+1)) and line.get_ydata().tolist() == v.tolist()
        assert ([o.get_text() for o in ax.get_legend().get_texts()] == ['teacher', 'student']
                and 'nats' in ax.get_ylabel())
    assert plot_entropy(dict(t=t), ax=ax) is ax and len(ax.lines) == 3

@pytest.mark.parametrize('kind', ['clean', 'adv'])
@pytest.mark.parametrize('own', [True, False])
def test_pictures_by_difficulty(kind, own, pair):
    "The numbers from the easiest image to the hardest, and their smooth lines"
    t,s,_ = pair
    score = None if own else np.random.default_rng(3).random(60)
    order = sorted(range(60), key=(-np.log(t.clean.astype(float))).mean(0).__getitem__ if own else score.__getitem__)
    p_t,p_s = t.probs(kind),s.probs(kind)
    sim = plot_similarity(t, s, score, kind)
    left,right = plot_right_class(t, s, score, kind)
    several = plot_improvement(dict(a=s, b=t), t, score, kind, 9)
    each = plot_improvement(dict(a=s, b=s), dict(a=t, b=t.until(2)), score, kind, 9)
    more = (p_s[-1].astype(float) - p_t[-1])[order]
    for ax,want in ((sim, cosine(p_t, p_s)[order]), (left, p_t[-1][order]), (right, more)):
        raw,line = ax.lines[-2:]
        np.testing.assert_allclose(raw.get_ydata(), want, rtol=1e-6)
        np.testing.assert_allclose(line.get_ydata(), smooth(want, 7), rtol=1e-6)
        assert ((np.diff(raw.get_xdata()) > 0).all() and 0 < raw.get_xdata()[0] and raw.get_xdata()[-1] < 100
                and 'difficulty' in ax.get_xlabel())
    np.testing.assert_allclose(several.lines[1].get_ydata(), smooth(more, 9))
    assert (several.lines[2].get_ydata() == 0).all()
    np.testing.assert_allclose(each.lines[1].get_ydata(), smooth(more, 9))
    np.testing.assert_allclose(each.lines[2].get_ydata(), smooth((p_s[-1].astype(float) - p_t[1])[order], 9))
    assert [o.get_text() for o in several.get_legend().get_texts()] == ['a', 'b'] and 'p_S - p_T' in right.get_ylabel()

def test_nothing_is_drawn_of_what_does_not_fit(pair):
    t,s,other = pair
    no_adv,few = Trajectory(s.clean),Trajectory(s.clean[:,:59])
    for f,message in ((lambda: plot_similarity(t, few), '`student` has 59'),
                      (lambda: plot_right_class(t, other), 'different classes, or in a different order'),
                      (lambda: plot_improvement(dict(akd=other), t), '`akd` and `teacher`'),
                      (lambda: plot_similarity(t, no_adv, kind='adv'), 'without an attack'),
                      (lambda: plot_right_class(t, s, [1., 2.]), '`score` has 2'),
                      (lambda: plot_right_class(t, s, width=4), '`width`'),
                      (lambda: plot_similarity(t, s, width=4), '`width`'),
                      (lambda: plot_improvement({}, t), '`students`'),
                      (lambda: plot_improvement(dict(a=s), dict(b=t)), '`teacher` must have the labels'),
                      (lambda: plot_entropy({}), '`trajectories` is empty'),
                      (lambda: plot_entropy(dict(s=no_adv)), "'s' has no entropy"),
                      (lambda: plot_similarity(t, s, kind='x'), '`kind`')):
        with pytest.raises(ValueError, match=message): f()
    assert plt.get_fignums() == []

# --- easiest and hardest ---

def test_easiest_and_hardest(digits):
    x,y = digits.x[:200],digits.y[:200] % 2
    score = np.random.default_rng(0).permutation(200)/7.
    for cls in (None, 0, 1):
        idx = [i for i in range(200) if cls is None or y[i] == cls]
        by = sorted(idx, key=score.__getitem__)
        easy,hard = easiest_hardest(x, y, score, 5, cls)
        assert easy.tolist() == by[:5] and hard.tolist() == by[::-1][:5]
    assert easiest_hardest(x, y, np.zeros(200), 3)[0].tolist() == [0, 1, 2]

@pytest.mark.parametrize('channels', [1, 3])
def test_sheets_of_images(channels, digits):
    x,y,score = (digits.x[:100].expand(-1, channels, -1, -1)*torch.linspace(.5, 1, channels).view(1, -1, 1, 1),
                 digits.y[:100], np.arange(100.))
    axs = plot_easiest_hardest(x, y, score, n=6, ncols=4)
    for ax,idx in zip(axs, easiest_hardest(x, y, score, 6)):
        sheet = np.atleast_3d(np.asarray(ax.images[0].get_array()))
        assert sheet.shape == (17, 35, channels) and (sheet[8] == 1).all() and (sheet[:,8] == 1).all()
        for i,j in enumerate(idx):
            np.testing.assert_allclose(sheet[i//4*9:i//4*9+8, i%4*9:i%4*9+8], x[j].permute(1,2,0).numpy(), atol=1e-6)
    assert 'easiest' in axs[0].get_title() and 'hardest' in axs[1].get_title() and 'nats' in axs[1].get_title()
    assert plot_easiest_hardest(x, y, score, 2, axs=axs) is axs

def test_bad_images(digits):
    x,y,score = digits.x[:20],digits.y[:20]*0,np.arange(20.)
    for f,message in ((lambda: easiest_hardest(x, y, score), '`n` must be from 1 to 10'),
                      (lambda: easiest_hardest(x, y, score, 0), '`n`'),
                      (lambda: easiest_hardest(x, y, score, 1, 3), 'class 3'),
                      (lambda: easiest_hardest(x, y[1:], score, 2), '`x`, `y` and `score`'),
                      (lambda: plot_easiest_hardest(x[:,0], y, score, 2), '`x` must be images'),
                      (lambda: plot_easiest_hardest(x, y, score, 2, ncols=0), '`ncols`'),
                      (lambda: easiest_hardest(x, y, score*np.nan, 2), '`score`')):
        with pytest.raises(ValueError, match=message): f()
    assert plt.get_fignums() == []
