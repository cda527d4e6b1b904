"Pictures of robustness show what `robustness` measures, and leave everything as it was."
import copy
import random
import matplotlib.pyplot as plt, numpy as np, pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, MixUp, ProgressCallback
from rkd_fastai.evaluation import interpret
from rkd_fastai.all import *
from rkd_fastai.evaluation.interpret import robustness_curve
from rkd_fastai.evaluation.robustness import wilson_interval
from rkd_fastai.data.images import pixel_data
from rkd_fastai.sampling import sample_positions

deterministic = PGD(.1, steps=5, random_start=False)
letters = list('ABCDEFGHIJ')

@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    plt.close('all')

class Denormalised(nn.Module):
    "`net`, a network on pixels, where images come normalised"
    def __init__(self, net, mean, std):
        super().__init__()
        self.net,self.mean,self.std = net,mean,std
    def forward(self, x): return self.net(x*self.std + self.mean)

class First(nn.Module):
    "`net`, a network on one channel, where images have three that differ"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x[:,:1])

@pytest.fixture
def learner(make_dls, make_learner, robust_net):
    "Factory of Learners of `robust_net`, for grey or colour images, normalised or not"
    def make(channels=1, stats=None, n_valid=60, **kwargs):
        net = copy.deepcopy(robust_net) # who trains it must not train everybody's
        if channels != 1: net = First(net)
        return make_learner(make_dls(n_valid=n_valid, channels=channels, stats=stats, **kwargs),
                            Denormalised(net, stats[0][0], stats[1][0]) if stats else net)
    return make

@pytest.fixture
def lettered(digits, make_learner, robust_net):
    "Such a Learner whose classes have names"
    part = lambda a, b: (digits.imgs[a:b], digits.labels[a:b])
    return make_learner(arrays_dls(part(0, 96), part(1297, 1357), vocab=letters, bs=32), robust_net)

def by_hand(learn, net, n, attack=deterministic, channels=1, seed=0):
    """Validation images, their classes, what is predicted, and both after an attack on each image that is right, one
    by one"""
    ds = learn.dls.valid_ds
    xs,ys = zip(*[(ds[i][0], int(ds[i][1])) for i in sample_positions([int(y) for _,y in ds], n, seed)])
    x,y = torch.stack([o.as_subclass(torch.Tensor).float()/255 for o in xs]),torch.tensor(ys)
    before = net(x).argmax(1)
    x_adv = torch.cat([attack(net, a[None], c[None]) if p == c else a[None] for a,c,p in zip(x, y, before)])
    return x, y, before, x_adv, net(x_adv).argmax(1)

stats = ([.5], [.25])

# --- accuracy against the radius ---

@pytest.mark.parametrize('attack, norm, eps', [
    ('pgd5', 'Linf', (0,.05,.1,.2)), ('fgsm', 'Linf', (.1,.3)), ('pgd5', 'L2', (0.,.5,1.)), ('cw', 'Linf', (.1,)),
    ('apgd', 'Linf', (0,.1)), ('clean', 'Linf', (0,.1))])
@pytest.mark.parametrize('seed, bs', [(0, 250), (3, 7)])
def test_each_point_is_the_number_of_robustness(attack, norm, eps, seed, bs, learner):
    learn,n = learner(),20 if attack == 'apgd' else 40
    curve = learn.robustness_curve(eps, attack, norm, n, seed, bs=bs)
    assert (curve.index.tolist() == sorted(eps) and curve.index.name == 'eps'
            and list(curve.columns) == ['accuracy','low','high'])
    for e,row in curve.iterrows():
        card = learn.robustness(attack, e, norm, n, seed, bs=bs) if e else learn.robustness('clean', n=n, seed=seed)
        assert row.accuracy == card.results[attack if e else 'clean']
        assert (row.low, row.high) == wilson_interval(row.accuracy, n) == tuple(card.to_df().iloc[0][['low','high']])
    assert curve.attrs == dict(attack=attack, norm=norm, n=n, seed=seed,
                               sample=learn.robustness('clean', n=n, seed=seed).sample.to_dict())

def test_the_curve_starts_at_clean_accuracy(learner, robust_net):
    learn = learner()
    x,y,before,*_ = by_hand(learn, robust_net, 60)
    curve = learn.robustness_curve((.2,0), 'pgd5')
    assert curve.accuracy[0] == (before == y).sum().item()/60 > curve.accuracy[.2]
    assert learn.robustness('pgd5', eps=0).pgd5 == curve.accuracy[0]

@pytest.mark.parametrize('eps', [.1, [.1,0], np.array([0,.1]), torch.tensor([0,.1], dtype=torch.double), (.1,.1,0)])
def test_radii_as_people_give_them(eps, learner):
    assert learner().robustness_curve(eps, 'fgsm', n=10).index.tolist() == ([.1] if isinstance(eps, float) else [0,.1])

@pytest.mark.parametrize('norm, want', [('Linf', [k/255 for k in (0,2,4,8,12,16)]), ('L2', [0,.25,.5,1,1.5,2])])
def test_radii_by_default(norm, want, learner):
    assert learner().robustness_curve(attack='fgsm', norm=norm, n=10).index.tolist() == want

def test_which_images(learner, robust_net, make_dls, make_learner):
    "Those of `robustness`: a test split before the validation set; at most as many as there are"
    learn = make_learner(make_dls(n_valid=30, n_test=40), robust_net)
    of = lambda **kw: learn.robustness_curve((.1,), 'pgd5', **kw)
    assert (of().attrs['n'] == of(n=None).attrs['n'] == 40 and of(dl=learn.dls.valid).attrs['n'] == 30
            and of(n=20).attrs['n'] == 20)
    for kw in (dict(), dict(dl=learn.dls.valid), dict(n=20), dict(dl=learn.dls.train, n=50)):
        assert of(**kw).accuracy[.1] == learn.robustness('pgd5', .1, **kw).pgd5
    assert learner().robustness_curve((.1,), 'pgd5').attrs['n'] == 60

def test_of_a_model(learner, robust_net):
    "A network on pixels gives what a Learner on normalised images gives"
    learn = learner()
    x,y = pixel_data(learn, n=40, seed=2)
    want = robustness_curve(robust_net, x, y, (0,.1), 'pgd5', seed=2)
    for l in (learn, learner(stats=stats), learner(channels=3, stats=([.5]*3, [.25]*3))):
        got = l.robustness_curve((0,.1), 'pgd5', n=40, seed=2)
        assert (got.accuracy[0] == want.accuracy[0]
                and abs(got.accuracy[.1] - want.accuracy[.1]) <= (.026 if l is not learn else 0))

def test_of_probabilities(learner, robust_net):
    learn = learner()
    learn.model = nn.Sequential(robust_net, nn.Softmax(1))
    with pytest.raises(ValueError, match='probabilities'): learn.robustness_curve((.1,), 'pgd5')
    assert (learn.robustness_curve((.1,), 'pgd5', logits=False).accuracy[.1]
            == learn.robustness('pgd5', .1, logits=False).pgd5)

class Sawtooth(nn.Module):
    "Its gradients are those of a saw"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x + .03*torch.sin(x*2e3))

def test_a_rising_curve_rises(make_learner, make_dls, robust_net, monkeypatch):
    "Nothing is carried over from a smaller radius, on paper or in fact"
    learn = make_learner(make_dls(), Sawtooth(robust_net))
    curve = learn.robustness_curve(np.linspace(0, .3, 16), 'fgsm')
    assert (curve.accuracy.diff() > 0).any()
    accs = iter([.9,.2,.7])
    def fake(model, x, y, name, *args, **kwargs):
        return Robustness({name: torch.arange(100) < next(accs)*100}, {name: []}, {name: 0.}, *args[:3])
    monkeypatch.setattr(interpret, 'measure_robustness', fake)
    ax = learn.plot_robustness_curve((0,.1,.2))
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([90,20,70])

@pytest.mark.parametrize('norm, unit, label', [('Linf', 255, 'radius ε (L∞), in 1/255'), ('L2', 1, 'radius ε (L2)')])
def test_what_is_drawn(norm, unit, label, learner):
    learn,eps = learner(),(0,.1,.2)
    curve = learn.robustness_curve(eps, 'pgd5', norm, 40, 1)
    ax = learn.plot_robustness_curve(eps, 'pgd5', norm, 40, 1)
    line, = ax.lines
    np.testing.assert_allclose(line.get_xdata(), np.array(eps)*unit)
    np.testing.assert_allclose(line.get_ydata(), 100*curve.accuracy)
    band = ax.collections[0].get_paths()[0].vertices
    for e,row in curve.iterrows():
        at = band[np.isclose(band[:,0], e*unit), 1]
        assert at.min() == pytest.approx(100*row.low) and at.max() == pytest.approx(100*row.high)
    assert (ax.get_xlabel() == label and ax.get_ylabel() == 'accuracy on 40 validation images, %'
            and [t.get_text() for t in ax.get_legend().get_texts()] == ['pgd5'])
    assert ax.get_ylim()[0] <= 0 and ax.get_ylim()[1] >= 100

def test_several_in_one_picture(learner):
    fig,(ax,other) = plt.subplots(1, 2)
    plots = [learner().plot_robustness_curve((0,.1), 'fgsm', n=20, ax=ax, label=name) for name in 'abc']
    assert all(p is ax for p in plots) and plt.get_fignums() == [fig.number] and not other.lines
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['a','b','c']
    assert len({l.get_color() for l in ax.lines}) == len({l.get_marker() for l in ax.lines}) == 3
    for l,band in zip(ax.lines, ax.collections):
        assert plt.matplotlib.colors.to_rgb(l.get_color()) == tuple(band.get_facecolor()[0][:3])
    learner().plot_robustness_curve((0,.1), 'fgsm', n=20, ax=ax, c='black', ls='--')
    assert (ax.lines[3].get_color() == 'black' and ax.lines[3].get_linestyle() == '--'
            and tuple(ax.collections[3].get_facecolor()[0][:3]) == (0,0,0))

def test_a_table_is_drawn_without_a_network(learner):
    "Also one that was written to a file, which keeps no `attrs`"
    curve = learner().robustness_curve((0,.1), 'fgsm', n=20)
    curve.attrs.clear()
    line, = plot_robustness_curve(curve, label='from a file').lines
    assert line.get_xdata().tolist() == [0,25.5] and line.get_label() == 'from a file'

@pytest.mark.parametrize('kwargs, says', [
    (dict(eps=8), '8/255'), (dict(eps=(0,-.1)), '`eps`'), (dict(eps=float('nan')), '`eps`'),
    (dict(eps=()), '`eps` is empty'), (dict(norm='L1'), '`norm`'), (dict(attack='pgd'), 'unknown attack'),
    (dict(attack=PGD()), '`attack` must be a name'), (dict(attack=None), '`attack` must be a name'),
    (dict(n=0), '`n`'), (dict(bs=0), '`bs`')])
def test_mistakes_with_curves(kwargs, says, learner):
    plt.close('all') # an earlier test's
    for f in ('robustness_curve', 'plot_robustness_curve'):
        with pytest.raises(ValueError, match=says.replace('(', r'\(')): getattr(learner(), f)(**kwargs)
    assert not plt.get_fignums()

def test_mistakes_are_found_before_images_are_read(learner):
    learn = learner()
    class Unread:
        dataset = range(10)
        def __iter__(self): raise AssertionError('read')
    for f,kwargs in (('robustness_curve', dict(eps=(.1,8))), ('show_adversarial', dict(attack='pgd')),
                     ('show_adversarial', dict(max_n=0))):
        with pytest.raises(ValueError): getattr(learn, f)(dl=Unread(), **kwargs)
    with pytest.raises(ValueError): AdversarialInterpretation.from_learner(learn, 'pgd', dl=Unread())

# --- before and after ---

def pictures():
    "Every picture of the figure: its pixels, title, colour of the title"
    return [(np.asarray(ax.images[0].get_array()), ax.get_title(), ax.title.get_color())
            for ax in plt.gcf().axes if ax.images]

def same_image(shown, x):
    np.testing.assert_allclose(shown if shown.ndim == 3 else shown[...,None], x.permute(1,2,0).numpy(), atol=2e-6)

@pytest.mark.parametrize('channels, stats', [(1, None), (1, stats), (3, None), (3, ([.5]*3, [.25]*3))])
def test_pictures_are_those_of_a_loop_by_hand(channels, stats, learner, robust_net):
    "Clean, perturbation tenfold around grey, adversarial; what is wrong already is not attacked"
    learn,n = learner(channels, stats),48
    net = robust_net if channels == 1 else First(robust_net)
    x,y,before,x_adv,after = by_hand(learn, net, n, seed=0)
    assert (before != y).any() and ((before == y) & (after != y)).any() and (after == y).any()
    learn.show_adversarial(deterministic, max_n=n, ncols=5, seed=0)
    shown = pictures()
    assert len(shown) == 3*n
    for i in range(n):
        clean,noise,adv = shown[3*i:3*i+3]
        same_image(clean[0], x[i]); same_image(adv[0], x_adv[i])
        np.testing.assert_allclose(noise[0] if channels == 3 else noise[0][...,None],
                                   (.5 + 10*(x_adv[i]-x[i])).clamp(0, 1).permute(1,2,0).numpy(), atol=1e-4)
        assert clean[1:] == (f'{y[i]}\n→ {before[i]}', 'green' if before[i] == y[i] else 'red')
        assert adv[1:] == (f'{y[i]}\n→ {after[i]}', 'green' if after[i] == y[i] else 'red')
        assert noise[1:] == ('perturbation ×10' if before[i] == y[i] else 'not attacked:\nwrong already', 'black')

def test_grey_is_shown_on_one_scale(learner):
    "Matplotlib would stretch each image by itself"
    learner().show_adversarial(max_n=4)
    assert {ax.images[0].get_clim() for ax in plt.gcf().axes} == {(0,1)}

def test_class_names(lettered, robust_net):
    x,y,before,_,after = by_hand(lettered, robust_net, 5)
    lettered.show_adversarial(deterministic)
    titles = [t for _,t,_ in pictures()]
    for shown,pred in ((titles[::3], before), (titles[2::3], after)):
        assert shown == [f'{letters[c]}\n→ {letters[p]}' for c,p in zip(y, pred)]

def test_attack_by_name_or_none(learner):
    def shown(*args, **kwargs):
        learner().show_adversarial(*args, **kwargs)
        res = np.stack([p[0] for p in pictures()]); plt.close('all')
        return res
    default = shown()
    for same in (shown('pgd20'), shown(PGD(steps=20)), shown('pgd20', eps=8/255, norm='Linf'), shown(seed=0)):
        assert np.array_equal(default, same)
    for other in (shown('fgsm'), shown(eps=.1), shown(norm='L2'), shown(seed=1)):
        assert not np.array_equal(default, other)
    assert np.array_equal(shown('pgd5', eps=1., norm='L2'), shown(PGD(1., steps=5, norm='L2')))

def test_contrast(learner):
    learn = learner()
    for scale in (1, 2.5):
        learn.show_adversarial(deterministic, max_n=1, scale=scale)
        (clean,*_),(noise,title,_),(adv,*_) = pictures(); plt.close('all')
        np.testing.assert_allclose(noise, .5 + scale*(adv-clean), atol=1e-6)
        assert title == f'perturbation ×{scale}'

@pytest.mark.parametrize('kwargs, shape, n', [
    (dict(), (5,3), 5), (dict(max_n=2), (2,3), 2), (dict(max_n=4, ncols=2), (2,6), 4),
    (dict(max_n=3, nrows=1), (1,9), 3), (dict(max_n=3, ncols=2), (2,6), 3),
    (dict(max_n=3, nrows=2, ncols=2), (2,6), 3), (dict(max_n=99), (8,3), 8), (dict(max_n=1, figsize=(4,2)), (1,3), 1)])
def test_grid(kwargs, shape, n, learner):
    learner(n_valid=8).show_adversarial(deterministic, **kwargs)
    fig = plt.gcf()
    spec = fig.axes[0].get_subplotspec().get_gridspec()
    assert ((spec.nrows, spec.ncols) == shape and len(pictures()) == 3*n
            and fig._suptitle.get_text() == 'Clean/Perturbation/Adversarial')
    if 'figsize' in kwargs: assert tuple(fig.get_size_inches()) == (4,2)

def test_into_axes(learner):
    fig,axs = plt.subplots(2, 3)
    learner().show_adversarial(deterministic, max_n=2, ctxs=axs.flatten(), alpha=.5)
    assert plt.get_fignums() == [fig.number] and len(pictures()) == 6 and axs[0,0].images[0].get_alpha() == .5

def test_images_are_a_sample(learner, make_dls, make_learner, robust_net):
    "Of the validation set, also where there is a test split; of `dl` without augmentation"
    learn = make_learner(make_dls(n_valid=30, n_test=40), robust_net)
    for kw,ds in ((dict(), learn.dls.valid_ds), (dict(dl=learn.dls.train), learn.dls.train_ds),
                  (dict(dl=learn.dls[2]), learn.dls[2].dataset)):
        learn.show_adversarial(deterministic, **kw)
        for (img,*_),i in zip(pictures()[::3], sample_positions([int(y) for _,y in ds], 5)):
            same_image(img, ds[i][0].as_subclass(torch.Tensor).float()/255)
        plt.close('all')

@pytest.mark.parametrize('kwargs, says', [
    (dict(max_n=0), '`max_n`'), (dict(attack='pgd'), 'unknown attack'),
    (dict(attack=PGD(), eps=.1), 'set them in this attack'), (dict(attack=PGD(), norm='L2'), 'set them in this attack'),
    (dict(eps=8), '8/255')])
def test_mistakes_with_pictures(kwargs, says, learner):
    with pytest.raises(ValueError, match=says): learner().show_adversarial(**kwargs)
    with pytest.raises(TypeError, match='must be an attack'): learner().show_adversarial(PGD)
    assert not plt.get_fignums()

# --- interpretation ---

@pytest.mark.parametrize('attack, norm', [('fgsm','Linf'), ('pgd5','Linf'), ('pgd5x2','Linf'), ('cw','Linf'),
                                          ('pgd5','L2'), ('clean','Linf'), ('apgd','Linf')])
@pytest.mark.parametrize('channels, stats, bs', [(1, None, 250), (3, ([.5]*3, [.25]*3), 17)])
def test_diagonal_is_robustness(attack, norm, channels, stats, bs, learner):
    "With the same random starts, batch by batch"
    learn,n,eps = learner(channels, stats),20 if attack == 'apgd' else 50,.1 if norm == 'Linf' else 1.
    interp = AdversarialInterpretation.from_learner(learn, attack, eps=eps, norm=norm, n=n, seed=3, bs=bs)
    cm = interp.confusion_matrix()
    assert cm.trace()/n == learn.robustness(attack, eps, norm, n, 3, bs=bs).results[attack] and cm.sum() == n

def test_matrix_is_that_of_a_loop_by_hand(lettered, robust_net):
    x,y,before,x_adv,after = by_hand(lettered, robust_net, 60)
    want = np.zeros((10,10), int)
    for c,p in zip(y, after): want[c,p] += 1
    interp = AdversarialInterpretation.from_learner(lettered, deterministic)
    assert np.array_equal(interp.confusion_matrix(), want)
    confused = {(letters[i], letters[j]): want[i,j] for i in range(10) for j in range(10) if i != j and want[i,j]}
    assert {(a,b): n for a,b,n in interp.most_confused()} == confused and confused
    assert interp.most_confused()[0][2] == max(confused.values())

def test_matrix_is_drawn(lettered):
    interp = AdversarialInterpretation.from_learner(lettered, deterministic)
    interp.plot_confusion_matrix(figsize=(6,6))
    fig = plt.gcf(); ax = fig.axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == letters == [t.get_text() for t in ax.get_yticklabels()]
    assert [int(t.get_text()) for t in ax.texts] == interp.confusion_matrix().flatten().tolist()
    assert ax.get_title() == 'Confusion under PGD, L∞ ε 0.1'
    fig.canvas.draw()
    box = ax.xaxis.label.get_window_extent()
    assert box.y0 >= 0 and box.height > 0 # fastai's own is cut off
    interp.plot_confusion_matrix(True, 'Mine', cmap='Greens')
    assert plt.gca().get_title() == 'Mine' and plt.gca().images[0].get_cmap().name == 'Greens'

class Shift(Attack):
    "No ball, no radius"
    def perturb(self, model, x, targ): return (x + .1).clamp(0, 1)

@pytest.mark.parametrize('attack, title', [(PGD(.5, norm='L2'), 'PGD, L2 ε 0.5'),
                                           (AutoAttack(version='apgd-ce'), 'AutoAttack, L∞ ε 8/255'),
                                           (Shift(), 'Shift')])
def test_title_says_which_attack(attack, title, learner):
    interp = AdversarialInterpretation.from_learner(learner(), attack, n=10)
    interp.plot_confusion_matrix()
    assert plt.gca().get_title() == f'Confusion under {title}' and interp.attack is attack

def test_report(lettered, capsys):
    interp = AdversarialInterpretation.from_learner(lettered, deterministic)
    cm = interp.confusion_matrix()
    interp.print_classification_report()
    rows = {r[0]: r[1:] for r in map(str.split, capsys.readouterr().out.splitlines()) if r}
    for i,c in enumerate(letters):
        assert float(rows[c][1]) == pytest.approx(cm[i,i]/cm[i].sum(), abs=.006) and int(rows[c][3]) == cm[i].sum()
    assert float(rows['accuracy'][0]) == pytest.approx(cm.trace()/60, abs=.006)

@pytest.mark.parametrize('channels, stats', [(1, None), (1, stats), (3, ([.5]*3, [.25]*3))])
def test_top_losses_show_adversarial_images(channels, stats, learner, robust_net):
    "As floats: rounded to bytes they would be others"
    learn,net = learner(channels, stats),robust_net if channels == 1 else First(robust_net)
    x,y,before,x_adv,after = by_hand(learn, net, 60)
    with torch.no_grad(): losses,probs = F.cross_entropy(net(x_adv), y, reduction='none'),net(x_adv).softmax(1).amax(1)
    interp = AdversarialInterpretation.from_learner(learn, deterministic)
    torch.testing.assert_close(interp.losses.as_subclass(torch.Tensor), losses, rtol=1e-3, atol=1e-3)
    for largest in (True, False):
        interp.plot_top_losses(5, largest)
        top = losses.argsort(descending=largest)[:5].tolist()
        for i,(img,title,_) in zip(top, pictures(), strict=True):
            same_image(img, x_adv[i])
            assert title == f'{after[i]}/{y[i]}\n{losses[i]:.2f} / {probs[i]:.2f}'
        plt.close('all')
    assert ((x_adv*255).round()/255 - x_adv).abs().max() > 1e-3

def test_top_losses_as_fastai_takes_them(lettered):
    interp = AdversarialInterpretation.from_learner(lettered, deterministic)
    interp.plot_top_losses(range(2, 6), nrows=1, figsize=(12,3))
    assert len(pictures()) == 4 and tuple(plt.gcf().get_size_inches()) == (12,3)
    interp.show_results([0,1,2])
    assert len(pictures()) == 3

def test_which_images_are_interpreted(make_dls, make_learner, robust_net):
    learn = make_learner(make_dls(n_valid=30, n_test=40), robust_net)
    for kw in (dict(), dict(dl=learn.dls.valid), dict(n=20), dict(dl=learn.dls.train, n=50), dict(dl=learn.dls.train)):
        x,y = pixel_data(learn, **kw)
        interp = AdversarialInterpretation.from_learner(learn, 'fgsm', eps=.1, **kw)
        cm = interp.confusion_matrix()
        assert (np.array_equal(cm.sum(1), y.bincount(minlength=10))
                and cm.trace()/len(y) == learn.robustness('fgsm', .1, **kw).fgsm)
    # more than there are means all
    assert len(AdversarialInterpretation.from_learner(learn, 'fgsm', n=99).dl.dataset) == 40
    with pytest.raises(ValueError, match='set them in this attack'):
        AdversarialInterpretation.from_learner(learn, PGD(), eps=.1)

def callbacks(net):
    return dict(adversarial=lambda l: l.to_adversarial(), akd=lambda l: l.to_rkd(net),
                trades=lambda l: l.add_cb(TRADES()), mixup=lambda l: l.add_cb(MixUp()),
                averaging=lambda l: l.add_cb(WeightAveraging()),
                bf16=lambda l: l.to_bf16())

@pytest.mark.parametrize('name', ['adversarial','akd','trades','mixup','averaging','bf16'])
def test_callbacks_do_not_disturb(name, learner, robust_net):
    learn = learner()
    want = AdversarialInterpretation.from_learner(learn, deterministic)
    callbacks(robust_net)[name](learn)
    got = AdversarialInterpretation.from_learner(learn, deterministic)
    assert torch.equal(got.losses, want.losses) and np.array_equal(got.confusion_matrix(), want.confusion_matrix())

def test_after_training(make_learner, make_dls):
    "An interpretation stays what it is; a new one is of the network as it is"
    learn = make_learner(make_dls(n_valid=60)).to_adversarial(PGD(.1, steps=2))
    learn.fit(1, 1e-3)
    old = AdversarialInterpretation.from_learner(learn, 'pgd5', eps=.1)
    cm = old.confusion_matrix()
    learn.fit(3, 5e-3)
    new = AdversarialInterpretation.from_learner(learn, 'pgd5', eps=.1)
    assert np.array_equal(old.confusion_matrix(), cm) and not np.array_equal(new.confusion_matrix(), cm)
    assert new.confusion_matrix().trace()/60 == learn.robustness('pgd5', .1).pgd5

@pytest.mark.parametrize('loss_func', [nn.CrossEntropyLoss(), F.cross_entropy,
                                       CrossEntropyLossFlat(label_smoothing=.1),
                                       CrossEntropyLossFlat(weight=torch.arange(1., 11))])
def test_losses(loss_func, learner, robust_net):
    "Whatever the loss, classes are told; a loss that says how keeps its own value"
    learn = learner()
    learn.loss_func = loss_func
    interp = AdversarialInterpretation.from_learner(learn, deterministic)
    x,y,before,x_adv,after = by_hand(learn, robust_net, 60)
    assert interp.confusion_matrix().trace() == (after == y).sum()
    f = loss_func.func if isinstance(loss_func, CrossEntropyLossFlat) else nn.CrossEntropyLoss()
    with torch.no_grad(): logits = robust_net(x_adv)
    want = F.cross_entropy(logits, y, f.weight, label_smoothing=f.label_smoothing, reduction='none')
    torch.testing.assert_close(interp.losses.as_subclass(torch.Tensor), want, rtol=1e-3, atol=1e-3)
    assert learn.loss_func is loss_func and getattr(f, 'reduction', 'mean') == 'mean'

class More(nn.Module):
    "`net` with two classes more, which it never means"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return F.pad(self.net(x), (0, 2), value=-50.)

def test_more_outputs_than_names(lettered, robust_net):
    lettered.model = More(robust_net)
    interp = AdversarialInterpretation.from_learner(lettered, deterministic)
    assert interp.confusion_matrix().shape == (12,12) and list(interp.vocab) == [*letters, 10, 11]

def test_loaders_of_pytorch(digits, make_learner, robust_net):
    "Which know neither names nor devices"
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(digits.x[1297:1337], digits.y[1297:1337]),
                                     batch_size=16)
    from fastai.vision.all import Learner
    learn = Learner(DataLoaders(dl, dl), robust_net, loss_func=CrossEntropyLossFlat())
    learn.remove_cb(ProgressCallback)
    cm = AdversarialInterpretation.from_learner(learn, 'pgd5', eps=.1).confusion_matrix()
    assert cm.trace()/40 == learn.robustness('pgd5', .1).pgd5 == learn.robustness_curve(.1, 'pgd5').accuracy[.1]
    learn.show_adversarial(max_n=2)
    assert pictures()[0][1].startswith(f'{digits.y[1297:1337][sample_positions(digits.y[1297:1337], 2)[0]]}\n→ ')

# --- nothing is changed ---

views = dict(
    curve = lambda l, net: l.plot_robustness_curve((0,.1), 'pgd5', n=20),
    show = lambda l, net: l.show_adversarial('pgd5', eps=.1),
    interpretation = lambda l, net: AdversarialInterpretation.from_learner(l, 'pgd5', eps=.1, n=20))

def state(learn):
    "What a Learner is made of, and every random number generator"
    loaders = [([*dl.after_batch.fs], dl.rng.getstate(), dl.shuffle, dl.dataset) for dl in learn.dls]
    return ([*learn.cbs], learn.loss_func, learn.dls, loaders, random.getstate(), np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(), learn.model)

@pytest.mark.parametrize('look', views)
@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('stats', [None, stats])
def test_looking_changes_nothing(look, train, stats, make_dls, make_learner, tiny_net, snapshot):
    learn = make_learner(make_dls(stats=stats), tiny_net(dropout=.5)).to_adversarial()
    learn.model.train(train)
    list(learn.model.parameters())[0].requires_grad_(False)
    before,was = snapshot.take(learn.model),state(learn)
    views[look](learn, None)
    assert snapshot.same(before, snapshot.take(learn.model)) and state(learn) == was

class Noisy(nn.Module):
    "`net` behind noise"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x + .3*torch.randn_like(x))

@pytest.mark.parametrize('look', views)
def test_random_networks_draw_nothing(look, make_dls, make_learner, robust_net):
    "From the random numbers of others"
    learn = make_learner(make_dls(), Noisy(robust_net))
    was = state(learn)
    views[look](learn, None)
    assert state(learn) == was

@pytest.mark.parametrize('look', views)
def test_looking_twice_shows_the_same(look, learner):
    def shown():
        res = views[look](learner(), None)
        if look == 'interpretation': return [res.losses.tolist(), res.confusion_matrix().tolist()]
        return ([p[0].tolist() for p in pictures()]
                + [line.get_xydata().tolist() for ax in plt.gcf().axes for line in ax.lines])
    first = shown(); plt.close('all'); torch.rand(3)
    assert first and shown() == first

@pytest.mark.parametrize('look', ['show', 'interpretation'])
@pytest.mark.parametrize('after, says', [(nn.Softmax(1), 'probabilities'), (lambda o: o/0, 'NaN'),
                                         (lambda o: o[:,:4], 'classes')])
def test_networks_that_cannot_be_attacked(look, after, says, learner, robust_net):
    class Spoilt(nn.Module):
        def __init__(self): super().__init__(); self.net = robust_net
        def forward(self, x): return after(self.net(x))
    learn = learner()
    learn.model = Spoilt()
    with pytest.raises(ValueError, match=says): views[look](learn, None)
    assert not plt.get_fignums()

@pytest.mark.parametrize('look', ['show', 'interpretation'])
def test_any_callable_is_an_attack(look, learner):
    "As in `robust_accuracy`: it need not be an `Attack`"
    learn, attack = learner(), lambda model, x, targ: deterministic(model, x, targ)
    if look == 'show': learn.show_adversarial(attack); return
    want = AdversarialInterpretation.from_learner(learn, deterministic, n=20)
    assert torch.equal(AdversarialInterpretation.from_learner(learn, attack, n=20).losses, want.losses)

def test_a_gpu_holds_one_batch(learner, robust_net):
    "Images go to the network's device `bs` at a time"
    moved, real, learn = [], torch.Tensor.to, learner()
    x, y = pixel_data(learn)
    want = interpret._attacked(robust_net, x, y, deterministic, 0, 8)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.Tensor, 'to', lambda self, *args, **kw: (moved.append(len(self)) if self.ndim == 4 and args
                                                                 and isinstance(args[0], torch.device) else None,
                                                                 real(self, *args, **kw))[1])
        assert torch.equal(interpret._attacked(robust_net, x, y, deterministic, 0, 8), want)
    assert len(x) > 8 and moved and max(moved) <= 8
