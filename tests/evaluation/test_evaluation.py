"The number that is reported: against a loop written by hand, resumed, and with the Learner as it was."
import copy, json, re, warnings
from types import SimpleNamespace

import matplotlib.pyplot as plt, pytest, torch, torch.nn as nn
from fastai.vision.all import ProgressCallback, accuracy, imagenet_stats

from rkd_fastai.evaluation import masking, robustness as evaluation
from rkd_fastai.all import *
from rkd_fastai.core import NotFinite
from rkd_fastai.evaluation.robustness import make_attack, measure_robustness, wilson_interval
from rkd_fastai.data.images import pixel_data
from rkd_fastai.sampling import sample_positions

def hand_loop(model, x, y, attack):
    "Right as it is and under attack, one image at a time"
    model.eval(); right = 0
    for a,b in zip(x.split(1), y.split(1)):
        if model(a).argmax(1) != b: continue
        right += (model(attack(model, a, b)).argmax(1) == b).item()
    return right/len(x)

deterministic = PGD(.1, steps=5, random_start=False)

@pytest.mark.parametrize('bs', [1, 7, 60, 1000])
def test_robust_accuracy_is_a_loop_by_hand(bs, robust_net, test_images):
    x, y = (o[:60] for o in test_images)
    got = robust_accuracy(robust_net, x, y, deterministic, bs=bs)
    assert isinstance(got, float) and got == pytest.approx(hand_loop(robust_net, x, y, deterministic)) and 0 < got < 1

def test_what_is_wrong_clean_stays_wrong(robust_net, test_images):
    "An attack that happens to correct an error does not count for the model"
    x, y = test_images
    class Swap(Attack):
        "Puts in place of every image one that the model takes for the class `shift` after the label"
        def __init__(self, shift): self.shift = shift
        def perturb(self, model, x, targ): return torch.stack([by_class[(t.item()+self.shift) % 10] for t in targ])
    with torch.no_grad(): right = robust_net(x).argmax(1) == y
    by_class = {c: x[right & (y == c)][0] for c in range(10)}
    wrong = (y[right]+1) % 10 # with these labels every image is wrong clean, and right under `Swap(0)`
    assert robust_accuracy(robust_net, x[right], wrong, Swap(0)) == 0
    assert robust_accuracy(robust_net, x[right], y[right], Swap(0)) == 1
    assert robust_accuracy(robust_net, x[right], y[right], Swap(1)) == 0

def test_default_attack_is_pgd20(robust_net, test_images):
    x, y = test_images
    torch.manual_seed(1); got = robust_accuracy(robust_net, x, y)
    torch.manual_seed(1); assert got == robust_accuracy(robust_net, x, y, PGD(steps=20))

def test_soft_targ(robust_net, test_images):
    "`targ` may be soft wherever it stands: an image then is right where its likeliest class is predicted"
    for n in (10, 50): # 10 images of 10 classes: no accidental broadcasting
        x, y = (o[:n] for o in test_images)
        soft = torch.nn.functional.one_hot(y, 10)*.7 + .03
        assert robust_accuracy(robust_net, x, soft, deterministic) == pytest.approx(
            robust_accuracy(robust_net, x, y, deterministic), abs=.11)
        assert (robust_accuracy(robust_net, x, soft, PGD(0., steps=0))
                == robust_accuracy(robust_net, x, y, PGD(0., steps=0)))

def test_model_is_evaluated_in_eval_mode_and_left_alone(tiny_net, digits, snapshot):
    model = tiny_net(dropout=.5).train(); before = snapshot.take(model)
    x, y = digits.x[:50], digits.y[:50]
    got = robust_accuracy(model, x, y, deterministic)
    assert snapshot.same(before, snapshot.take(model))
    assert got == robust_accuracy(model.eval(), x, y, deterministic)

def test_robust_accuracy_errors(tiny_net):
    model, x, y = tiny_net(), torch.rand(4, 1, 8, 8), torch.arange(4)
    for bad,word in (((x[:0], y[:0]), '`x`'), ((x, y[:3]), 'targ'), ((x*255, y), r'\[0, 1\]'), ((x, y+20), 'targ')):
        with pytest.raises(ValueError, match=word): robust_accuracy(model, *bad)
    with pytest.raises(ValueError, match='NaN'): robust_accuracy(lambda x: x.flatten(1)*float('nan'), x, y)


# --- learn.robustness ---

@pytest.fixture
def learn(make_learner, make_dls, robust_net):
    import copy
    return make_learner(make_dls(n=64, n_valid=48, n_test=40), copy.deepcopy(robust_net), metrics=accuracy)
small = dict(attacks=('clean', 'pgd5'), eps=.1)

def test_card(learn, digits, robust_net, tmp_path):
    r = learn.robustness(**small, seed=3)
    x, y = digits.x[112:152], digits.y[112:152] # the third loader is the test split
    assert r.n == 40 and r.eps == .1 and r.seed == 3 and r.norm == 'Linf'
    assert r.clean == pytest.approx((robust_net(x).argmax(1) == y).float().mean().item())
    assert abs(r.pgd5 - hand_loop(robust_net, x, y, PGD(.1, steps=5))) <= 2/40 and r.pgd5 <= r.clean
    df = r.to_df()
    assert list(df.index) == ['clean', 'pgd5'] and df.accuracy['pgd5'] == r.pgd5
    assert (df.low <= df.accuracy).all() and (df.accuracy <= df.high).all()
    card = json.loads(r.to_json(tmp_path/'card.json'))
    assert card == json.loads((tmp_path/'card.json').read_text())
    assert card['n'] == 40 and card['eps'] == .1 and card['seed'] == 3 and card['results']['pgd5']['accuracy'] == r.pgd5
    assert 'pgd5' in repr(r) and 'pgd5' in r._repr_html_() and 'all 40 test images' in repr(r)

@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_default_attacks(learn):
    r = learn.robustness(n=6, eps=.15)
    assert 0 <= r.autoattack <= r.pgd20 <= r.clean <= 1 and r.n == 6

def test_validation_set_where_there_is_no_third_loader(make_learner, make_dls, robust_net, digits):
    r = make_learner(make_dls(n=64, n_valid=48), robust_net).robustness(('clean',))
    x, y = digits.x[64:112], digits.y[64:112]
    assert r.n == 48 and r.clean == pytest.approx((robust_net(x).argmax(1) == y).float().mean().item())

def test_dl_and_n_choose_the_images(learn, digits, robust_net):
    r = learn.robustness(('clean',), n=37, dl=learn.dls.train) # shuffled for training, in order here
    x, y = digits.x[:37], digits.y[:37]
    assert r.n == 37 and r.clean == pytest.approx((robust_net(x).argmax(1) == y).float().mean().item())
    assert learn.robustness(('clean',), dl=learn.dls.train).n == 64 # nothing dropped

def test_normalisation_is_undone(make_learner, make_dls, tiny_net):
    "On ImageNet-normalised DataLoaders, the same as on pixel space with the normalisation inside the network"
    net = tiny_net(n_in=3)
    a = make_learner(make_dls(channels=3, stats=imagenet_stats), net).robustness(('clean', 'pgd3'), eps=.05)
    model = PixelModel(net, *imagenet_stats)
    b = make_learner(make_dls(channels=3), model).robustness(('clean', 'pgd3'), eps=.05)
    assert (a.clean, a.pgd3) == (b.clean, b.pgd3)

def test_same_seed_same_number(learn):
    torch.manual_seed(1); a = learn.robustness(**small, seed=1, bs=16)
    torch.manual_seed(2); b = learn.robustness(**small, seed=1, bs=16)
    assert a.results == b.results

def test_learner_and_random_numbers_are_left_alone(learn, snapshot):
    learn.to_adversarial(); learn.model.train(); learn.model[1].eval(); learn.create_opt()
    before, cbs, dls, rng = snapshot.take(learn.model), list(learn.cbs), learn.dls, torch.get_rng_state()
    tfms = [list(dl.after_batch.fs) for dl in dls.loaders]
    learn.robustness(**small, n=20)
    assert snapshot.same(before, snapshot.take(learn.model)) and list(learn.cbs) == cbs and learn.dls is dls
    assert [list(dl.after_batch.fs) for dl in dls.loaders] == tfms and torch.equal(rng, torch.get_rng_state())

def test_half_precision_network_is_left_in_half_precision(learn):
    learn.model.half()
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    learn.robustness(('clean',), n=10)
    assert all(v.dtype == before[k].dtype and torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

def test_plain_pytorch_loaders(make_learner, digits, tiny_net):
    "fastai takes PyTorch's own DataLoader; so do we, for training and for the number"
    from fastai.vision.all import DataLoaders
    dl = torch.utils.data.DataLoader(list(zip(digits.x[:64], digits.y[:64])), batch_size=16)
    learn = make_learner(DataLoaders(dl, dl), tiny_net())
    learn.to_rkd(tiny_net(seed=3), attack=PGD(steps=1)).fit(1)
    assert learn.robustness(('clean',)).n == 64

def watched(run, path, die_at=None):
    "What `run(path)` returns, and the random seed of each of its batches, until it is killed in one"
    class Killed(BaseException): pass
    real, seeds = evaluation.robust_flags, []
    def flags(*args):
        if len(seeds)+1 == die_at: raise Killed
        seeds.append(torch.initial_seed())
        return real(*args)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(evaluation, 'robust_flags', flags)
        try: return run(path), seeds
        except Killed: return None, seeds

def images_of(path): return {k: v['is_robust'] for k,v in json.loads(path.read_text())['attacks'].items()}

@pytest.mark.parametrize('at', range(1, 8))
def test_resume(at, learn, tmp_path):
    "Killed in any batch and started again, a run ends with the same flags, image by image"
    def run(path): return learn.robustness(('clean', 'pgd3', 'cw'), eps=.1, bs=14, seed=4, state_path=path)
    want, all_seeds = watched(run, tmp_path/'whole.json')
    _, before = watched(run, tmp_path/'state.json', die_at=at)
    got, after = watched(run, tmp_path/'state.json')
    assert len(all_seeds) >= 7 and before + after == all_seeds, 'no batch twice, each with its own random numbers'
    assert got.results == want.results and all(torch.equal(got.flags[k], want.flags[k]) for k in want.flags)
    assert images_of(tmp_path/'state.json') == images_of(tmp_path/'whole.json')
    assert sorted(p.name for p in tmp_path.glob('*state*')) == ['state.json'] # no temporary file is left

def test_a_finished_run_is_read_back(learn, tmp_path):
    kw = small | dict(state_path=tmp_path/'s.json')
    want = learn.robustness(**kw)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(evaluation, 'robust_flags', lambda *_: 1/0)
        assert learn.robustness(**kw).results == want.results

@pytest.mark.parametrize('change', [dict(eps=.05), dict(seed=1), dict(n=30), dict(attacks=('clean', 'pgd6')),
                                    dict(bs=7), dict(norm='L2'), 'weights', 'images'], ids=str)
def test_state_of_another_run_is_refused(change, learn, make_dls, tmp_path):
    path = tmp_path/'s.json'
    learn.robustness(**small, state_path=path); before = path.read_text()
    if change == 'weights': learn.model[0].weight.data[0,0,0,0] += 1e-3
    if change == 'images': learn.dls = make_dls(n=64, n_valid=47, n_test=40)
    with pytest.raises(ValueError, match='state_path'):
        learn.robustness(**(small | (change if isinstance(change, dict) else {})), state_path=path)
    assert path.read_text() == before

def test_state_of_a_network_that_answers_otherwise(plain_net, robust_net, test_images, tmp_path):
    "With the same weights: by other statistics, other β, or as probabilities"
    x, y = (t[:8] for t in test_images)
    def refused(a, b, **kw):
        path = tmp_path/f'{len(list(tmp_path.iterdir()))}.json'
        measure_robustness(a, x, y, 'clean', state_path=path)
        measure_robustness(copy.deepcopy(a), x, y, 'clean', state_path=path)
        with pytest.raises(ValueError, match='state_path'): measure_robustness(b, x, y, 'clean', state_path=path, **kw)
    refused(PixelModel(plain_net, .5, .5), PixelModel(plain_net, .5, .25))
    refused(Teacher([plain_net, robust_net]), Teacher([plain_net, robust_net], betas=[.3, .7]))
    refused(plain_net, plain_net, logits=False)
    path = tmp_path/'probs.json' # and the other way round
    measure_robustness(plain_net, x, y, 'clean', state_path=path, logits=False)
    with pytest.raises(ValueError, match='state_path'): measure_robustness(plain_net, x, y, 'clean', state_path=path)

def test_float32_is_float32(plain_net, test_images):
    "Not TF32, as a GPU's convolutions are by default; the settings are put back"
    settings = lambda: (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())
    seen, before = set(), settings()
    class Watched(nn.Module):
        def __init__(self): super().__init__(); self.net = plain_net
        def forward(self, x): seen.add(settings()); return self.net(x)
    assert before[0]
    try:
        torch.set_float32_matmul_precision('high'); was = settings()
        measure_robustness(Watched(), *(t[:8] for t in test_images), 'pgd1')
        assert seen == {(False, 'highest')} and settings() == was
    finally: torch.set_float32_matmul_precision(before[1])

@pytest.mark.parametrize('text', ['', '{', '[]', '{"flags": {}}', '3', '{"run": 3, "flags": {}}',
                                  '{"run": {}, "flags": 3}'])
def test_state_file_that_is_none(text, learn, tmp_path):
    (tmp_path/'s.json').write_text(text)
    with pytest.raises(ValueError, match='state_path'): learn.robustness(**small, state_path=tmp_path/'s.json')

def test_state_file_with_other_images(learn, tmp_path):
    "Whatever else agrees: it must say of each image whether it stands"
    path = tmp_path/'s.json'
    learn.robustness(**small, state_path=path)
    state = json.loads(path.read_text())
    state['attacks']['clean']['is_robust'] = state['attacks']['clean']['is_robust'][:-1]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match='is not a state file'): learn.robustness(**small, state_path=path)

@pytest.mark.parametrize('kw,word', [(dict(attacks=('pgd',)), 'pgd'), (dict(attacks=('deepfool',)), 'deepfool'),
                                     (dict(eps=8), 'eps'), (dict(norm='L1'), 'norm'), (dict(n=0), '`n`'),
                                     (dict(n=-1), '`n`'), (dict(n=2.5), '`n`'), (dict(bs=0), '`bs`')], ids=str)
def test_robustness_errors(kw, word, learn):
    with pytest.raises(ValueError, match=word): learn.robustness(**({'attacks': ('clean', 'pgd2')} | kw))

def test_attack_names():
    assert make_attack('pgd20', .1).settings == PGD(.1, steps=20).settings
    assert make_attack('pgd50x10', .1).settings == PGD(.1, steps=50, restarts=10).settings
    assert type(make_attack('autoattack', .1, seed=7)) is AutoAttack and make_attack('autoattack', seed=7).seed == 7
    assert type(make_attack('fgsm', .1)) is FGSM and make_attack('fgsm', .5, 'L2').norm == 'L2'

def test_wilson_interval():
    low, high = wilson_interval(.5, 100) # by hand: (0.5 ± 1.96·√(0.25/100 + 1.96²/40000) + 1.96²/200)/(1 + 1.96²/100)
    assert (low, high) == pytest.approx((.4038, .5962), abs=1e-4)
    assert (wilson_interval(0., 20)[0] == 0 and wilson_interval(1., 20)[1] == pytest.approx(1)
            and wilson_interval(1., 20)[0] == pytest.approx(20/(20+1.96**2)))


# --- the metric ---

def test_metric_is_robust_accuracy(learn, digits, robust_net):
    x, y = digits.x[64:112], digits.y[64:112]
    learn.metrics = [accuracy, RobustAccuracy(deterministic), RobustAccuracy(deterministic, n=20)]
    _, acc, robust, few = learn.validate()
    assert robust == pytest.approx(hand_loop(robust_net, x, y, deterministic)) and robust <= acc
    idx = sample_positions(y, 20)
    assert few == pytest.approx(hand_loop(robust_net, x[idx], y[idx], deterministic))
    assert learn.validate()[2] == robust

def test_metric_leaves_training_alone(make_learner, make_dls, tiny_net):
    def train(metrics):
        torch.manual_seed(1)
        learn = make_learner(make_dls(shuffle=False), tiny_net(), metrics=metrics).to_adversarial(PGD(steps=1))
        learn.fit(2, .01)
        return list(learn.model.parameters())
    for p,q in zip(train([RobustAccuracy()]), train([])): torch.testing.assert_close(p, q, rtol=0, atol=0)

def test_metric_errors():
    with pytest.raises(ValueError, match='`n`'): RobustAccuracy(n=0)
    with pytest.raises(ValueError, match='`n`'): RobustAccuracy(n=-1)

def test_seeded_leaves_every_gpu_alone(monkeypatch):
    "On the CPU no GPU is seeded: nobody would restore it"
    from rkd_fastai.core import seeded
    torch.manual_seed(3); want = torch.rand(2)
    torch.manual_seed(3)
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, 'manual_seed_all', lambda seed: pytest.fail('a GPU was seeded'))
        with seeded(0): a = torch.rand(2)
        with seeded(0): assert torch.equal(torch.rand(2), a)
    assert torch.equal(torch.rand(2), want)

def test_probabilities_are_not_logits(make_learner, make_dls, robust_net):
    "Said before anything is attacked; by their logarithm they give what the logits give"
    plain = make_learner(make_dls(n_valid=60), robust_net)
    soft = make_learner(make_dls(n_valid=60), nn.Sequential(robust_net, nn.Softmax(1)))
    with pytest.raises(ValueError, match='returns probabilities.*`logits=False`'): soft.robustness('clean')
    want = plain.robustness(('clean','pgd7','cw'), eps=.1).results
    assert soft.robustness(('clean','pgd7','cw'), eps=.1, logits=False).results == want and want['pgd7'] < want['clean']
    logps = make_learner(make_dls(n_valid=60), nn.Sequential(robust_net, nn.LogSoftmax(1))) # are logits, too
    assert logps.robustness('pgd7', eps=.1).pgd7 == want['pgd7']

@pytest.mark.parametrize('wrong, says', [
    (dict(attack='pgd20'), '`attack` must be an attack'), (dict(attack=PGD), '`attack` must be an attack'),
    (dict(bs=0), '`bs` must be'), (dict(bs=2.5), '`bs` must be'), (dict(targ=[1, 2]), '`targ` must be a tensor'),
    (dict(targ=torch.zeros(4, 1, dtype=torch.long)), '`targ` must hold'), (dict(x=[1]), '`x` must be a tensor')],
    ids=str)
def test_arguments_of_robust_accuracy(wrong, says, tiny_net):
    arguments = dict(x=torch.rand(4, 1, 8, 8), targ=torch.zeros(4, dtype=torch.long)) | wrong
    with pytest.raises((TypeError, ValueError), match=says): robust_accuracy(tiny_net(), **arguments)

def test_a_learner_is_measured_through_its_normalisation(make_learner, make_dls, tiny_net):
    learn = make_learner(make_dls(stats=([.3], [.4])), tiny_net())
    x, y = pixel_data(learn)
    assert robust_accuracy(learn, x, y, PGD(.1, steps=0)) == learn.robustness(('clean',)).clean

def test_radius_of_clean_accuracy_too(make_learner, tiny_net):
    for eps in (8, -1):
        with pytest.raises(ValueError, match='`eps`'): make_learner(model=tiny_net()).robustness(('clean',), eps=eps)

def test_a_state_file_of_other_images(tmp_path, make_learner, tiny_net):
    "Another number of images is another run, and no damage"
    learn = make_learner(model=tiny_net())
    learn.robustness(('clean',), n=6, state_path=tmp_path/'s.json')
    with pytest.raises(ValueError, match='belongs to another run'):
        learn.robustness(('clean',), n=7, state_path=tmp_path/'s.json')

def test_images_without_labels(make_learner, tiny_net):
    learn = make_learner(model=tiny_net())
    unlabelled = [(torch.rand(3, 1, 8, 8),)]
    with pytest.raises(ValueError, match='has no labels'): learn.robustness(('clean',), dl=unlabelled)

def test_a_network_that_returns_nan_under_attack():
    "The first class is not the answer to NaN"
    class Breaks(nn.Module):
        def forward(self, x):
            m = x.flatten(1).mean(1, keepdim=True)
            return torch.where(m > .51, torch.nan, torch.cat([1-m, m], 1))
    x, y = torch.full((4,1,2,2), .499), torch.zeros(4, dtype=torch.long)
    with pytest.raises(NotFinite, match='NaN or infinite logits'): robust_accuracy(Breaks(), x, y, PGD(steps=5))


# --- BatchNorm without running statistics ---

def batchwise(dim):
    if dim == 1:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8, track_running_stats=False),
                             nn.Linear(8, 10))
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 10))
without = (r'BatchNorm `{}` of `{}` keeps no running statistics \(`track_running_stats=False`\)'
           r'.*build the network with `track_running_stats=True`')

def test_batch_statistics_are_named(make_learner, digits):
    """Where one image has no statistics, an error; where its answer depends on others, a warning; by the layer, on
    every way"""
    one, many = batchwise(1), batchwise(2)
    x, y = digits.x[:9], digits.y[:9]
    for call in (lambda: make_learner(model=one).robustness('clean'), lambda: PGD(.1)(one, x[:1], y[:1])):
        with pytest.raises(ValueError, match=without.format(2, 'model')), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            call()
    with pytest.raises(ValueError, match=without.format(2, 'teacher')): Teacher(one).probs(x[:1])
    for call in (lambda: robust_accuracy(many, x, y, PGD(steps=1)),
                 lambda: make_learner(model=many).robustness('clean'),
                 lambda: make_learner(model=many, metrics=RobustAccuracy(PGD(steps=1))).validate()):
        with pytest.warns(UserWarning, match=without.format(1, 'model')): call()
    for call in (lambda: make_learner().to_rkd(many),
                 lambda: Teacher([many, Teacher(one)]).check(make_learner().dls, 'clean')):
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter('always')
            try: call()
            # of the check of one image at a time
            except ValueError as e: assert re.search(without.format('.*', 'model'), str(e))
        assert any(re.match(without.format('members.0.model.1', 'teacher'), str(w.message)) for w in shown)
    groups = nn.Sequential(nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8), nn.GroupNorm(2, 8), nn.Flatten(),
                           nn.Linear(288, 10)) # each image by itself
    assert 0 <= robust_accuracy(groups, x, y, PGD(steps=1)) <= 1
# --- bars ---

views = dict(robustness=dict(attacks='pgd2'), check_robustness={}, robustness_curve=dict(eps=(0, .1), attack='pgd2'),
             plot_robustness_curve=dict(eps=(0, .1), attack='pgd2'))

@pytest.fixture
def bars(monkeypatch):
    "What each bar shows on a terminal that anybody watches"
    made = []
    class Bar:
        def __init__(self, gen, leave): assert not leave; self.shown = []; made.append(self)
        def on_iter_begin(self): self.live = True
        def on_update(self, value, text): assert self.live; self.shown.append((value, text))
        def on_iter_end(self): self.live = False
    monkeypatch.setattr(evaluation, 'progress_bar', Bar)
    monkeypatch.setattr('sys.stdout.isatty', lambda: True)
    return made

@pytest.fixture
def one_symptom(monkeypatch): monkeypatch.setattr(masking, '_symptoms', masking._symptoms[2:3])

@pytest.mark.parametrize('look', views)
def test_who_sees_a_bar(look, learn, bars, one_symptom):
    "Whoever sees fastai's, unless `progress` says otherwise: one, which comes to its end and is cleared"
    see = lambda **kwargs: getattr(learn, look)(n=20, **{'eps': .1} | views[look] | kwargs)
    see(); see(progress=False)
    assert not bars
    see(progress=True)
    learn.add_cb(ProgressCallback())
    see(progress=False)
    assert len(bars) == 1
    see(); see(progress=True)
    assert len(bars) == 3
    for bar in bars:
        values = [value for value,_ in bar.shown]
        assert not bar.live and values == sorted(values) and (values[0], values[-1]) == (0, 100)
        assert all(re.match(r'\d+% \[\d+:\d\d, ', text) for _,text in bar.shown)
    plt.close('all')

@pytest.mark.parametrize('look', views)
def test_no_bar_in_a_file(look, learn, one_symptom, capsys):
    "Where the output is no terminal nothing is printed"
    learn.add_cb(ProgressCallback())
    for progress in (None, True): getattr(learn, look)(n=20, **{'eps': .1} | views[look], progress=progress)
    plt.close('all')
    assert capsys.readouterr() == ('', '')

def test_a_bar_is_cleared_after_an_error(learn, bars):
    class Fails(torch.nn.Module):
        def forward(self, x): raise RuntimeError('no')
    learn.model.append(Fails())
    with pytest.raises(RuntimeError, match='no'): learn.robustness('pgd2', n=20, progress=True)
    assert [bar.live for bar in bars] == [False]

@pytest.mark.parametrize('bad', ['bar', 1, [print]], ids=str)
@pytest.mark.parametrize('look', views)
def test_what_progress_cannot_be(look, bad, learn, monkeypatch):
    "Said before any image is read"
    for dl in learn.dls.loaders: monkeypatch.setattr(dl, 'new', lambda *_, **__: pytest.fail('images were read'))
    with pytest.raises(TypeError, match='`progress` must be None'): getattr(learn, look)(**views[look], progress=bad)

@pytest.mark.parametrize('look,kwargs', [('robustness', dict(attacks=('pgd20', 'pgd10'), eps=.1)),
                                         ('check_robustness', dict(eps=.1)),
                                         ('robustness_curve', dict(eps=(0, .05, .1, .15)))],
                         ids=lambda o: o if isinstance(o, str) else '')
def test_progress_as_a_function(look, kwargs, learn, monkeypatch):
    """A share that never falls, from 0 to 1; within a factor of two the time left, in passes of the network; and it
    moves within batches"""
    passes, shown = [0], []
    learn.model.register_forward_hook(lambda m, x, out: passes.append(passes.pop()
                                                                      + len(out)*(3 if out.requires_grad else 1)))
    monkeypatch.setattr('rkd_fastai.progress.time', SimpleNamespace(time=lambda: passes[0])) # whose clock goes by them
    monkeypatch.setattr('rkd_fastai.progress.Progress.memory', 1e9)
    getattr(learn, look)(**kwargs, bs=30, progress=lambda share, text: shown.append((passes[0], share, text)))
    shares = [share for _,share,_ in shown]
    assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares) and len(set(shares)) > 60
    left = [(re.match(r'(at most )?(?:(\d+):)?(\d+):(\d\d) left, ', text), passes[0] - done) for done,_,text in shown]
    left = [(sum(k*int(m[i] or 0) for i,k in ((2, 3600), (3, 60), (4, 1))), true, m[1]) for m,true in left if m]
    assert all(true/2 < seconds < 2*true for seconds,true,_ in left if .05 < true/passes[0] < .95)
    assert look != 'check_robustness' or not any(at_most for *_,at_most in left)
