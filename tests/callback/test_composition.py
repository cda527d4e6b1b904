"""The training methods beside the rest of fastai: callbacks that step, log, save and stop; inference, export and
reproducibility."""
import copy, random, subprocess, sys, types
from ast import literal_eval
from contextlib import nullcontext

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastai.vision.all import (SGD, AdaptiveAvgPool, BnFreeze, Callback, ClassificationInterpretation, CSVLogger,
                               EarlyStoppingCallback, GradientAccumulation, GradientClip, ImageDataLoaders, L,
                               PILImageBW, ProgressCallback, SaveModelCallback, ShowGraphCallback, ValueMetric,
                               accuracy, params, resnet18, set_seed, vision_learner)
from fastprogress.fastprogress import ConsoleMasterBar
from safetensors.torch import save_file

from rkd_fastai.all import *
from rkd_fastai.evaluation.robustness import measure_robustness
from rkd_fastai.data.images import pixel_data

still, noisy = PGD(.1, steps=2, random_start=False), PGD(.1, steps=2)
methods = dict(
    at     = lambda teacher, attack: AdversarialTraining(attack),
    trades = lambda teacher, attack: TRADES(attack),
    akd    = lambda teacher, attack: AKDCallback(teacher, attack=attack),
    rslad  = lambda teacher, attack: RSLADCallback(teacher, attack=attack),
    ard    = lambda teacher, attack: ARDCallback(teacher, attack=attack),
    ckd    = lambda teacher, attack: CKDCallback(teacher))
each = pytest.mark.parametrize('method', methods.values(), ids=methods)
attacking = pytest.mark.parametrize('method', list(methods.values())[:-1], ids=list(methods)[:-1])
loads = pytest.mark.filterwarnings('ignore:.*numpy.core is deprecated') # fastai's `learn.load`

class Seen(Callback):
    """What each training batch gives: images, loss as it is logged and as it goes backwards, and around a step
    gradients, learning rates and weights"""
    order, run_valid = 100, False # after all others, and not reached where a step is skipped
    def __init__(self): self.images,self.logged,self.losses,self.grads,self.rates,self.steps = [],[],[],[],[],[]
    def before_batch(self): self.images.append(plain(self.learn.xb[0]))
    def after_loss(self): self.logged.append(self.learn.loss.item()); self.losses.append(self.learn.loss_grad.item())
    def before_step(self):
        self.grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.model.parameters()])
        self.rates.append([h['lr'] for h in self.opt.hypers])
    def after_step(self): self.steps.append([p.detach().clone() for p in self.model.parameters()])

def plain(x): return x.detach().as_subclass(torch.Tensor).clone()
def weights(model): return [v.clone() for v in model.state_dict().values()]
def same(a, b): return all(torch.equal(p, q) for p,q in zip(a, b, strict=True))
def close(a, b, rtol=1e-4, atol=1e-6):
    for p,q in zip(a, b, strict=True): torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
def smooth(losses):
    "The running mean that fastai's Recorder keeps"
    w = .98**np.arange(len(losses))[::-1]
    return (w*losses).sum()/w.sum()

@pytest.fixture
def sgd_learner(make_learner):
    "Factory of Learners whose step is the gradient times the learning rate"
    def make(dls, model, **kwargs): return make_learner(dls, model, opt_func=SGD, wd=0., moms=(0.,0.,0.), **kwargs)
    return make


# --- what makes and takes the step ---

@each
@pytest.mark.parametrize('bs', [64, 24], ids=['big batch', 'accumulated'])
def test_clipped_steps(method, bs, sgd_learner, make_dls, tiny_net):
    """`GradientClip` clips the gradient of the whole window, as plain PyTorch does; the loss logged is the window's,
    unscaled"""
    def fit(bs, *cbs):
        seen = Seen()
        sgd_learner(make_dls(n=64, bs=bs, shuffle=False), tiny_net(bn=False),
                    cbs=[method(tiny_net(seed=7), still), seen, *cbs]).fit(2, .1)
        return seen
    length = lambda grads: torch.stack([g.norm() for g in grads]).norm().item()
    free, want = fit(64), tiny_net(bn=False)
    bound = length(free.grads[0])/2
    for p,g in zip(want.parameters(), free.grads[0]): p.grad = g
    nn.utils.clip_grad_norm_(want.parameters(), bound)
    torch.optim.SGD(want.parameters(), .1).step()
    # batches of 24, 24 and 16
    got, big = fit(bs, GradientClip(bound), GradientAccumulation(64)), fit(64, GradientClip(bound))
    assert len(got.steps) == 2 and all(length(g) <= bound*(1+1e-5) for g in got.grads)
    close(got.steps[0], want.parameters())
    close(got.steps[1], big.steps[1]) # the second window starts from nothing
    n = [len(x) for x in got.images]
    for of_two_epochs in (got.losses, np.multiply(got.logged, n)/64):
        assert sum(of_two_epochs) == pytest.approx(sum(big.losses), rel=1e-4)

@each
@pytest.mark.parametrize('how,step,factor', [('fit', 0, 1), ('fit_exp', 1, .5), ('fit_rkd', 0, 1/25)])
def test_discriminative_learning_rates(method, how, step, factor, sgd_learner, make_dls, tiny_net):
    "Each parameter group moves by its own rate times its gradient, which is a Learner's with one rate"
    def fit(how, lr, **kwargs):
        seen = Seen()
        learn = sgd_learner(make_dls(n=32, shuffle=False), tiny_net(),
                            splitter=lambda m: [params(m[:2]), params(m[2:])],
                            cbs=[method(tiny_net(seed=7), still), seen])
        getattr(learn, how)(2, lr, **kwargs)
        return seen
    seen, start = (fit(how, slice(.01, .1), **(dict(decay=.5) if how == 'fit_exp' else {})),
                   list(tiny_net().parameters()))
    assert seen.rates[step] == pytest.approx([.01*factor, .1*factor])
    close(seen.grads[0], fit('fit', .1).grads[0])
    rates = [seen.rates[step][i] for i in (0, 0, 0, 0, 1, 1)] # convolution and BatchNorm, then the linear layer
    close([p - lr*g for p,lr,g in zip([start, *seen.steps][step], rates, seen.grads[step])], seen.steps[step])

@each
@pytest.mark.parametrize('train_bn', [True, False], ids=['bn trains', 'bn frozen'])
def test_freeze(method, train_bn, sgd_learner, make_dls, tiny_net):
    """A frozen body stays, the rest gets the step it gets anyway, and the attack sees through the body: x′ is the
    unfrozen network's"""
    def learner():
        net, seen = tiny_net(), Seen()
        net = nn.Sequential(net[:3], net[3:])
        # as `freeze` has it; `BnFreeze` then keeps its statistics, and does nothing elsewhere
        net[0][1].requires_grad_(train_bn)
        return sgd_learner(make_dls(n=32, shuffle=False), net, splitter=lambda m: [params(m[0]), params(m[1])],
                           train_bn=train_bn, cbs=[method(tiny_net(seed=7), still), BnFreeze(), seen]), seen
    (free, at_free), (learn, seen) = learner(), learner()
    free.fit(1, .1)
    learn.freeze()
    start, flags = copy.deepcopy(learn.model.state_dict()), [p.requires_grad for p in learn.model.parameters()]
    assert flags == [False, False, train_bn, train_bn, True, True]
    learn.fit(1, .1)
    assert [p.requires_grad for p in learn.model.parameters()] == flags and same(seen.images, at_free.images)
    moves = {k: not k.startswith('0.0') and (train_bn or not k.startswith('0.1')) for k in start}
    for k,v in learn.model.state_dict().items():
        close([v], [(free.model.state_dict() if moves[k] else start)[k]], **({} if moves[k] else dict(rtol=0, atol=0)))
    assert not torch.equal(learn.model[1][2].weight, start['1.5.weight'])
    learn.unfreeze(); learn.fit(1, .1)
    assert not torch.equal(learn.model[0][0].weight, start['0.0.weight'])

@attacking
def test_attack_through_a_frozen_body(method, sgd_learner, make_dls, tiny_net):
    "x′ is that of an attack by hand on an unfrozen copy in eval mode"
    net, seen = tiny_net(dropout=.5), Seen()
    unfrozen = copy.deepcopy(net).eval()
    dls = make_dls(n=32, shuffle=False)
    learn = sgd_learner(dls, net, splitter=lambda m: [params(m[:3]), params(m[3:])],
                        cbs=[method(tiny_net(seed=7), still), seen])
    learn.freeze(); learn.fit(1, .1)
    x, y = map(plain, next(iter(dls.train)))
    x_adv = x
    for _ in range(2):
        x_adv = x_adv.detach().requires_grad_()
        g, = torch.autograd.grad(F.cross_entropy(unfrozen(x_adv), y), x_adv)
        x_adv = (x_adv.detach() + .025*g.sign()).clamp(0, 1)
    close(seen.images[:1], [x_adv])
    assert (x_adv-x).abs().max() > .04

@each
def test_channels_last(method, sgd_learner, make_dls, tiny_net):
    "The same training in another memory format"
    def fit(channels_last):
        seen = Seen()
        learn = sgd_learner(make_dls(n=64, channels=3, shuffle=False, stats=([.3,.4,.5], [.25,.3,.2])),
                            tiny_net(n_in=3), cbs=[method(tiny_net(n_in=3, seed=7), still), seen])
        if channels_last: learn.to_channelslast(use_amp=False)
        learn.fit(2, .1)
        assert learn.model[0].weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        return seen, weights(learn.model)
    (got, got_weights), (want, want_weights) = fit(True), fit(False)
    close(got_weights, want_weights)
    assert got.losses == pytest.approx(want.losses, rel=1e-4)

@each
def test_progressive_resizing(method, sgd_learner, make_dls, digits, monkeypatch):
    "After `learn.dls = ...` it trains as a new Learner would on those: their images, their size, their normalisation"
    def net(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), AdaptiveAvgPool(), nn.Flatten(),
                             nn.Linear(8, 10))
    teacher, model, seen = net(7), net(0), Seen()
    small = make_dls(n=64, stats=([.3], [.25]), shuffle=False)
    monkeypatch.setattr(digits, 'imgs', digits.imgs.repeat(2, 1).repeat(2, 2))
    big = make_dls(n=64, stats=([.5], [.5]), shuffle=False)
    learn = sgd_learner(small, model, cbs=[method(teacher, still), seen])
    learn.fit(1, .1)
    other, at_other = copy.deepcopy(model), Seen()
    learn.dls = big; learn.fit(1, .1)
    sgd_learner(big, other, cbs=[method(teacher, still), at_other]).fit(1, .1)
    assert [x.shape[-1] for x in seen.images] == [8, 8, 16, 16]
    assert same(seen.images[2:], at_other.images) and same(weights(model), weights(other))


# --- what logs, saves and stops ---

class Becomes(Callback):
    "Each epoch ends with the weights of one of `nets`"
    def __init__(self, nets): self.nets = nets
    def after_train(self): self.model.load_state_dict(self.nets[self.epoch].state_dict())

@loads
def test_robust_accuracy_saves_and_stops(make_learner, make_dls, plain_net, robust_net):
    """Both look for the highest robust accuracy, which is not the lowest loss; an epoch no better than the best
    counts as worse"""
    nets = [plain_net, robust_net, plain_net, robust_net, plain_net]
    learn = make_learner(make_dls(), copy.deepcopy(plain_net), metrics=RobustAccuracy(PGD(.1, steps=5)),
                         cbs=[AdversarialTraining(still), Becomes(nets)])
    learn.fit(5, .01, cbs=[SaveModelCallback('robust_accuracy'), EarlyStoppingCallback('robust_accuracy', patience=2)])
    _, losses, robust = zip(*learn.recorder.values)
    assert len(robust) == 4 and np.argmax(robust) == 1 and robust[1] == robust[3] > robust[0] == robust[2]
    assert np.argmin(losses) != 1 and same(weights(learn.model), weights(robust_net))

@loads
@each
def test_the_average_is_what_is_saved(method, make_learner, make_dls, tiny_net):
    """Every file holds that epoch's average, taken by hand in a fit that keeps none, and the best of them is loaded
    in the end"""
    class Average(Callback):
        def before_fit(self): self.mean,self.epochs = [p.detach().clone() for p in self.model.parameters()], []
        def after_step(self): self.mean = [.8*m + .2*p.detach() for m,p in zip(self.mean, self.model.parameters())]
        def after_epoch(self): self.epochs.append(self.mean)
    def learner(cb):
        score = iter([.1, .5, .3])
        return make_learner(make_dls(shuffle=False), tiny_net(bn=False), cbs=[method(tiny_net(seed=7), still), cb],
                            metrics=ValueMetric(lambda: next(score), 'robust_accuracy'))
    average, learn = Average(), learner(WeightAveraging(.8, ramp=False))
    learner(average).fit(3, .01)
    learn.fit(3, .01, cbs=[SaveModelCallback(every_epoch=True, fname='each'), SaveModelCallback('robust_accuracy')])
    for i,mean in enumerate(average.epochs): close(torch.load(learn.path/f'models/each_{i}.pth').values(), mean)
    close(learn.model.parameters(), average.epochs[1])
    assert not same(average.epochs[1], average.epochs[2])

@each
def test_csv_logger(method, make_learner, make_dls, tiny_net):
    "The file is the recorder's table: the method's own loss in training, clean loss and metrics in validation"
    dls, seen, attack = make_dls(n=32, shuffle=False), Seen(), PGD(.1, steps=3, random_start=False)
    learn = make_learner(dls, cbs=[method(tiny_net(seed=7), still), seen], metrics=[accuracy, RobustAccuracy(attack)])
    learn.fit(2, .01, cbs=CSVLogger())
    log = pd.read_csv(learn.path/'history.csv')
    assert (list(log) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'robust_accuracy', 'time']
            == list(learn.recorder.metric_names))
    np.testing.assert_allclose(log.iloc[:, 1:-1], learn.recorder.values, rtol=1e-6)
    assert log.train_loss[0] == pytest.approx(seen.losses[0], rel=1e-5) # one batch an epoch
    robust = robust_accuracy(learn.model, *pixel_data(learn), attack)
    assert list(log.iloc[-1, 2:-1]) == pytest.approx(
        [*make_learner(dls, learn.model, metrics=accuracy).validate(), robust], rel=1e-5)

@each
def test_show_graph(method, make_learner, make_dls, tiny_net, monkeypatch):
    "The curves are the method's losses and the clean validation losses"
    drawn, seen = [], Seen()
    monkeypatch.setattr(ConsoleMasterBar, 'update_graph',
                        lambda self, graphs, *bounds: drawn.append(copy.deepcopy((graphs, bounds))))
    learn = make_learner(make_dls(n=64, bs=32), cbs=[method(tiny_net(seed=7), still), seen])
    learn.fit(2, .01, cbs=[ProgressCallback(), ShowGraphCallback()])
    ((iters, train), (ends, valid)), (x_bounds, y_bounds) = drawn[-1]
    assert len(drawn) == 2 and list(iters) == [0, 1, 2, 3] and ends == [2, 4] and x_bounds == (0, 4)
    assert train[-1].item() == pytest.approx(smooth(seen.losses), rel=1e-5)
    assert (valid[-1] == learn.recorder.values[-1][1]
            == pytest.approx(make_learner(learn.dls, learn.model).validate()[0]))
    assert y_bounds[1] == pytest.approx(max(*valid, *(t.item() for t in train)))

@pytest.fixture
def tensorboard(monkeypatch):
    "fastai's callback, with a writer that keeps what it is told: TensorBoard itself need not be installed"
    class Writer:
        def __init__(self, log_dir): self.logged = logged
        def add_scalar(self, name, value, step): self.logged.setdefault(name, []).append((step, float(value)))
        def add_graph(self, model, x): self.logged['graph'] = x
        def add_figure(self, name, fig, step): self.logged[name] = step; plt.close(fig)
        def close(self): self.logged['closed'] = True
    logged = {}
    monkeypatch.setitem(sys.modules, 'tensorboard', types.ModuleType('tensorboard'))
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.delitem(sys.modules, 'fastai.callback.tensorboard', raising=False)
    from fastai.callback.tensorboard import TensorBoardCallback
    yield TensorBoardCallback, logged
    sys.modules.pop('fastai.callback.tensorboard')

@each
def test_tensorboard(method, tensorboard, sgd_learner, make_dls, tiny_net):
    "It is told of clean images, the method's losses and clean metrics, and the training is that without it"
    TensorBoardCallback, logged = tensorboard
    def fit(*cbs):
        seen = Seen()
        learn = sgd_learner(make_dls(n=64, bs=32, shuffle=False), tiny_net(), metrics=accuracy,
                            cbs=[method(tiny_net(seed=7), still), seen, *cbs])
        learn.fit(2, .1)
        return learn, seen
    (learn, seen), (without, _) = fit(TensorBoardCallback()), fit()
    assert same(weights(learn.model), weights(without.model))
    assert torch.equal(plain(logged['graph']), plain(next(iter(learn.dls.train))[0]))
    assert dict(logged['train_loss'])[4] == pytest.approx(smooth(seen.losses), rel=1e-5)
    clean = sgd_learner(learn.dls, learn.model, metrics=accuracy).validate()
    assert ([dict(logged[k])[4] for k in ('valid_loss', 'accuracy')] == pytest.approx(clean)
            and logged['Sample results'] == 4 and logged['closed'])


# --- inference ---

@loads
@each
def test_lr_find_leaves_no_trace(method, make_learner, make_dls, tiny_net):
    "The next fit is the one without `lr_find`, bit for bit: weights, optimiser, teacher and callback are as before"
    def fit(look):
        torch.manual_seed(1)
        cb = method(tiny_net(seed=7, dropout=.5), noisy)
        learn = make_learner(make_dls(shuffle=False), tiny_net(), cbs=cb)
        learn.fit(1, .01)
        opt, before = copy.deepcopy(learn.opt.state_dict()['state']), weights(learn.model)
        if look: learn.lr_find(show_plot=False, num_it=6)
        assert same(before, weights(learn.model))
        for was,now in zip(opt, learn.opt.state_dict()['state'], strict=True):
            assert same(map(torch.as_tensor, was.values()), map(torch.as_tensor, now.values()))
        torch.manual_seed(5); learn.fit(1, .01)
        teacher = getattr(cb, 'teacher', nn.Identity())
        return weights(learn.model) + weights(teacher), [m.training for m in teacher.modules()]
    (got, modes), (want, want_modes) = fit(True), fit(False)
    assert same(got, want) and modes == want_modes

def drawn():
    "Titles and images of the open figure"
    found = [(ax.get_title(), ax.images[0].get_array().tolist()) for ax in plt.gcf().axes if ax.images]
    plt.close('all')
    return found
def interpreted(learn):
    it = ClassificationInterpretation.from_learner(learn)
    it.plot_top_losses(4)
    return *it.top_losses(5), torch.tensor(it.confusion_matrix()), it.losses, drawn()

inference = dict(
    validate       = lambda l: [torch.tensor(l.validate())],
    get_preds      = lambda l: l.get_preds(with_loss=True, with_input=True),
    train_preds    = lambda l: l.get_preds(ds_idx=0),
    predict        = lambda l: l.predict(l.dls.valid_ds[0][0]),
    test_dl        = lambda l: l.get_preds(dl=l.dls.test_dl([o[0] for o in l.dls.valid_ds]))[:1],
    tta            = lambda l: l.tta(n=2),
    show_results   = lambda l: [l.show_results(max_n=4), drawn()],
    Interpretation = interpreted)

@pytest.mark.few(12)
@each
@pytest.mark.parametrize('call', inference.values(), ids=inference)
def test_inference_is_the_plain_learners(method, call, make_learner, make_dls, tiny_net):
    "The numbers and pictures of a Learner without us, from neither attack nor teacher; training goes on after it"
    class Forbidden(nn.Module):
        def forward(self, *_): raise AssertionError('attack or teacher ran')
    cb = method(tiny_net(seed=7), noisy)
    learn = make_learner(make_dls(stats=([.3], [.25]), batch_tfms=PadCropFlip(1)), cbs=cb, metrics=accuracy)
    learn.fit(1, .01)
    def ask(learn): set_seed(3); return call(learn)
    kept = {k: vars(cb)[k] for k in ('attack', 'teacher') if k in vars(cb)}
    vars(cb).update(dict.fromkeys(kept, Forbidden()))
    got, want = ask(learn), ask(make_learner(learn.dls, learn.model, metrics=accuracy))
    for g,w in zip(got, want, strict=True): assert torch.equal(g, w) if isinstance(g, torch.Tensor) else g == w
    vars(cb).update(kept)
    before = weights(learn.model); learn.fit(1, .01)
    assert not same(before, weights(learn.model))

class OnlyHere(nn.Sequential):
    "A teacher of 1.2 MB, whose class no other process can import"
    def __init__(self): super().__init__(nn.Flatten(), nn.Linear(64, 4000), nn.Linear(4000, 10))

def test_export_to_another_process(make_learner, make_dls, digits, tmp_path):
    """At most 10 KB more than a plain Learner's file, and a fresh process predicts from it what we do, without the
    teacher's class"""
    item, probs, sizes = PILImageBW.create(digits.imgs[0]), {}, {}
    def stop(_): raise KeyboardInterrupt
    for event in (None, 'after_pred', 'after_epoch'): # where the fit is interrupted
        for name,method in dict(plain=lambda *_: None, **methods).items():
            learn, fname = make_learner(make_dls(), cbs=method(OnlyHere(), noisy)), f'{name}-{event}.pkl'
            with pytest.raises(KeyboardInterrupt) if event else nullcontext():
                learn.fit(1, .01, cbs=Callback(**{event: stop}) if event else None)
            learn.export(fname)
            probs[fname], sizes[fname] = learn.predict(item)[2].tolist(), (tmp_path/fname).stat().st_size
            assert sizes[fname] <= sizes[f'plain-{event}.pkl'] + 10_000
    np.save(tmp_path/'item.npy', digits.imgs[0])
    code = ("import numpy as np, sys; from fastai.vision.all import PILImageBW, load_learner; "
            "item = PILImageBW.create(np.load('item.npy')); "
            "print({name: load_learner(name).predict(item)[2].tolist() for name in sys.argv[1:]})")
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *probs],
                       cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert literal_eval(r.stdout.splitlines()[-1]) == {name: pytest.approx(p, abs=1e-6) for name,p in probs.items()}


@pytest.mark.slow
def test_export_for_plain_fastai(make_images, tmp_path):
    """After `to_natural` a process that cannot import this package predicts the same, as the works-with page says;
    without, it cannot read the file"""
    dls = ImageDataLoaders.from_folder(make_images(), valid_pct=.3, seed=0, bs=2, num_workers=0)
    learn = vision_learner(dls, resnet18, pretrained=False, path=tmp_path).to_rkd(
        nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 2)), attack=PGD(.1, steps=1))
    learn.export('with.pkl')
    learn.to_natural().export('without.pkl')
    code = ("import sys; sys.modules['rkd_fastai'] = None; from fastai.vision.all import load_learner; "
            "print(load_learner(sys.argv[1]).predict('images/dark/0.png')[2].tolist())")
    run = lambda name: subprocess.run([sys.executable, '-W', 'ignore', '-c', code, name], cwd=tmp_path,
                                      capture_output=True, text=True)
    assert literal_eval(run('without.pkl').stdout.splitlines()[-1]) == pytest.approx(
        learn.predict(tmp_path/'images/dark/0.png')[2].tolist(), abs=1e-6)
    assert run('with.pkl').returncode


# --- reproducibility ---

@pytest.fixture
def cudnn(monkeypatch):
    "What `set_seed(reproducible=True)` sets is put back"
    for flag in ('deterministic', 'benchmark'):
        monkeypatch.setattr(torch.backends.cudnn, flag, getattr(torch.backends.cudnn, flag))

@each
def test_reproducible(method, cudnn, make_learner, make_dls, tiny_net):
    """From the same seed the same student, bit for bit: shuffling, augmentation, dropout and the attack's noise;
    another seed, another student"""
    def student(seed):
        set_seed(seed, reproducible=True)
        learn = make_learner(make_dls(batch_tfms=PadCropFlip(1)), tiny_net(dropout=.2),
                             cbs=method(tiny_net(seed=7), noisy))
        learn.fit_one_cycle(2, .01)
        return weights(learn.model), learn.recorder.losses
    (a, losses), (b, other_losses), (c, _) = student(1), student(1), student(2)
    assert same(a, b) and losses == other_losses and not same(a, c)

random_attacks = dict(pgd=noisy, kl=PGD(.1, steps=2, objective='kl'), l2=PGD(.5, steps=2, norm='L2'),
                      restarts=PGD(.1, steps=2, restarts=2), ffgsm=FFGSM(.1))

@pytest.mark.parametrize('attack', random_attacks.values(), ids=random_attacks)
def test_noise_is_torchs(attack, digits, tiny_net):
    "x′ follows PyTorch's global generator and nothing else; Python's and NumPy's are left alone"
    model, x = tiny_net(), digits.x[:16]
    y = torch.full((16, 10), .1) if attack.objective == 'kl' else digits.y[:16]
    def x_adv(seed, others):
        random.seed(others); np.random.seed(others); torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist()
        out = attack(model, x, y)
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
        return out
    assert torch.equal(x_adv(1, 1), x_adv(1, 2)) and not torch.equal(x_adv(1, 1), x_adv(2, 1))

@pytest.mark.parametrize('attack', [FGSM(.1), still], ids=['fgsm', 'pgd'])
def test_attacks_without_a_start_draw_nothing(attack, digits, tiny_net):
    before = torch.get_rng_state()
    attack(tiny_net(dropout=.5), digits.x[:16], digits.y[:16])
    assert torch.equal(before, torch.get_rng_state())

@each
def test_training_draws_the_attacks_noise_only(method, make_learner, make_dls, tiny_net):
    """From a batch to its x′ the generator goes as far as the attack, called by hand, takes it; clean distillation
    leaves it"""
    states, seen, net = [], Seen(), tiny_net()
    cb = method(tiny_net(seed=7, dropout=.5), noisy)
    class State(Callback):
        run_valid = False
        def __init__(self, order): self.order = order
        def before_batch(self): states.append(torch.get_rng_state())
    dls, start = make_dls(n=32, shuffle=False), copy.deepcopy(net)
    make_learner(dls, net, cbs=[cb, State(cb.order-1), State(cb.order+1), seen]).fit(1, .01)
    x, y = map(plain, next(iter(dls.train)))
    torch.set_rng_state(states[0])
    if not isinstance(cb, CKDCallback): x = noisy(start, x, y)
    assert torch.equal(seen.images[0], x) and torch.equal(torch.get_rng_state(), states[1])

def test_two_averages_are_refused(make_learner):
    "The second would train from the average of the first; a recipe may bring one"
    average = WeightAveraging(.9)
    for first,second in ((average, average), (average, WeightAveraging(.8))):
        learn = make_learner(cbs=first)
        before = copy.deepcopy(learn.model.state_dict())
        with pytest.raises(ValueError, match='two `WeightAveraging`'): learn.fit(1, cbs=second)
        assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

@pytest.mark.parametrize('cbs', [
    lambda net: AKDCallback(net, attack=still),
    lambda net: [AdversarialTraining(still), WeightAveraging(.5)],
    lambda net: [RSLADCallback(net, cache=True, attack=still), CatastrophicOverfitting(stop=True)]],
    ids=['akd','averaged','cached and watched'])
@pytest.mark.parametrize('measure', [lambda l: l.validate(), lambda l: (l.tta(n=1), l.summary())],
                         ids=['validate','tta and summary'])
def test_validate_in_the_middle_of_a_fit(cbs, measure, make_learner, make_dls, tiny_net):
    "What another callback measures between two batches is not the end of the fit to ours"
    class Nosy(Callback):
        order, run_valid = 200, False
        def after_batch(self):
            measure(self.learn)
            self.learn.training = True; self.model.train()
    ends = []
    for nosy in ([], [Nosy()]):
        torch.manual_seed(0)
        learn = make_learner(make_dls(shuffle=False), tiny_net(), cbs=[*L(cbs(tiny_net(seed=7))), *nosy])
        learn.fit(2, .01)
        ends.append(weights(learn.model))
    assert same(*ends)

ours = {k: lambda net, d, m=methods[k]: m(net, still) for k in ('at','trades','akd','ckd')} | dict(
    averaging=lambda net, d: WeightAveraging(.5),
    keep=lambda net, d: KeepEpochs(),
    catastrophic=lambda net, d: CatastrophicOverfitting(still, n=16),
    overfitting=lambda net, d: RobustOverfitting(restore=True),
    resume=lambda net, d: Resume(d/'resume.pth'),
    finite=lambda net, d: NonFinite(),
    trajectory=lambda net, d: RecordTrajectory(d/'trajectory', n=16, attack=still))

@loads
@pytest.mark.parametrize('name,fitted', [*((k, True) for k in ours), ('resume', False)])
def test_what_else_a_learner_does(name, fitted, make_learner, make_dls, tiny_net, tmp_path):
    """Each answers as on a plain Learner, and leaves the weights and the files of the callback alone; `Resume` must
    not bring back those of its file"""
    learn = make_learner(make_dls(n=32, n_valid=16, bs=16, shuffle=False), tiny_net(),
                         metrics=[accuracy, RobustAccuracy(still)], cbs=ours[name](tiny_net(seed=7), tmp_path))
    if fitted: learn.fit(1, .01)
    learn.model.load_state_dict(tiny_net(seed=3).state_dict())
    plain_learn = make_learner(learn.dls, tiny_net(seed=3))
    files = lambda: {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*') if p.is_file()}
    kept = files()
    assert 'Conv2d' in learn.summary() and 'Conv2d' in plain_learn.summary()
    for f in (lambda l: l.validate()[:1], lambda l: l.get_preds()[0], lambda l: l.get_preds(with_loss=True)[2],
              lambda l: l.tta(n=1)[0], lambda l: l.predict(l.dls.valid_ds[0][0])[2]):
        np.testing.assert_allclose(f(learn), f(plain_learn), rtol=1e-5)
    learn.show_results(max_n=2); plt.close('all')
    assert files() == kept
    learn.lr_find(num_it=8, show_plot=False)
    assert same(weights(learn.model), weights(tiny_net(seed=3)))
    assert {k: v for k,v in files().items() if k in kept} == kept
    learn.export()

# --- a network whose `state_dict` holds more than tensors ---

class Counting(nn.Module):
    "A network that counts its training steps, and keeps the count in its extra state"
    def __init__(self, net): super().__init__(); self.net, self.steps = net, 0
    def forward(self, x): self.steps += self.training; return self.net(x)
    def get_extra_state(self): return dict(steps=self.steps, at=[torch.tensor(float(self.steps))], mark=b'\x00')
    def set_extra_state(self, state):
        self.steps = state['steps']
        assert state['at'][0] == self.steps and state['mark'] == b'\x00'

@pytest.mark.parametrize('cbs', [
    lambda: [KeepEpochs(overwrite=True), WeightAveraging(.9)],
    lambda: [AdversarialTraining(still), CatastrophicOverfitting(stop=True, drop=0.)],
    lambda: [RobustOverfitting('accuracy', gap=0., restore=True)]], ids=['kept and averaged','collapse','overfitting'])
def test_extra_state(cbs, make_learner, make_dls, tiny_net):
    "It goes with the weights it was saved with, and these are the bits of a network without it"
    fits = []
    for wrap in (nn.Sequential, Counting):
        torch.manual_seed(0)
        learn = make_learner(make_dls(shuffle=False), wrap(tiny_net()), cbs=cbs(), metrics=accuracy)
        learn.fit(2, .1)
        fits.append(learn)
    tensors = lambda l: [v for k,v in l.model.state_dict().items() if not k.endswith('_extra_state')]
    assert same(*map(tensors, fits))
    plain_learn,learn = fits
    assert learn.robustness(('clean','pgd2')).results == plain_learn.robustness(('clean','pgd2')).results
    assert learn.model.steps in (3, 6)
    if not (saved := list((learn.path/'models').glob('*.pth'))): return
    teacher = Teacher.at_epoch(learn.path/'models', 2, Counting(tiny_net(seed=9)))
    assert len(saved) == 2 and teacher.members[0].model.steps == learn.model.steps == 6
    assert same(weights_of(teacher), tensors(learn))

def weights_of(teacher): return [v for v in teacher.state_dict().values() if isinstance(v, torch.Tensor)]

def test_extra_state_that_is_not_plain(make_learner, tiny_net, tmp_path):
    "Said before a run that could not be continued or read back"
    class Opaque(Counting):
        def get_extra_state(self): return dict(f=test_extra_state)
    for cb in (KeepEpochs(), Resume(tmp_path/'run.pth')):
        learn = make_learner(model=Opaque(tiny_net()), cbs=cb)
        before = copy.deepcopy(learn.model.net.state_dict())
        with pytest.raises(ValueError, match='`_extra_state`, which `get_extra_state` returned, is not plain data'):
            learn.fit(1)
        assert all(torch.equal(v, before[k]) for k,v in learn.model.net.state_dict().items())
        assert not list(tmp_path.rglob('*.pth'))

def test_state_file_of_another_extra_state(plain_net, test_images, tmp_path):
    x, y = (o[:4] for o in test_images)
    net = Counting(plain_net)
    measure = lambda: measure_robustness(net, x, y, 'clean', state_path=tmp_path/'s').clean
    assert measure() == measure()
    net.steps = 7
    with pytest.raises(ValueError, match='belongs to another run'): measure()

def test_extra_state_in_files(make_learner, tiny_net, digits, tmp_path):
    "Checkpoints of both kinds; one without it says so, one with more than its bytes is refused"
    net, x = Counting(tiny_net(seed=4)), digits.x[:5]
    net.steps = 5
    torch.save({'state_dict': {f'module.{k}': v for k,v in net.state_dict().items()}, 'epoch': 3}, tmp_path/'a.pth')
    teacher = load_teacher(tmp_path/'a.pth', Counting(tiny_net()))
    assert teacher.members[0].model.steps == 5 and torch.equal(teacher.probs(x), Teacher(net).probs(x))
    save_file({k: v for k,v in net.state_dict().items() if isinstance(v, torch.Tensor)}, tmp_path/'a.safetensors')
    with pytest.warns(UserWarning, match='has no `_extra_state`'):
        teacher = load_teacher(tmp_path/'a.safetensors', Counting(tiny_net()))
    assert teacher.members[0].model.steps == 0 and torch.equal(teacher.probs(x), Teacher(net).probs(x))
    for extra in ([torch.zeros(1).expand(10**9)], dict(a=[[torch.zeros(1).expand(10**9)]])):
        torch.save({**net.state_dict(), '_extra_state': extra}, tmp_path/'b.pth')
        with pytest.raises(ValueError, match='b.pth.*`_extra_state` of shape'):
            load_teacher(tmp_path/'b.pth', Counting(tiny_net()))
    around = []; around.append(around)
    torch.save({**net.state_dict(), '_extra_state': around}, tmp_path/'c.pth')
    with pytest.raises(TypeError): load_teacher(tmp_path/'c.pth', Counting(tiny_net())) # from its own `set_extra_state`
    out = export_robustbench(net, x, tmp_path/'out')
    assert (out/'model.pt2').exists()
