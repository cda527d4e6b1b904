"""Recipes from the command line: each trains and can be distilled from, the card says the numbers used, and what
cannot be is said in one line."""
import gzip, json, os, random, signal, struct, subprocess, sys, time
import numpy as np, pytest, torch
from rkd_fastai.attacks.pgd import FFGSM, PGD
from rkd_fastai.callback.adversarial import RobustCallback
from rkd_fastai.study.run import load_run
from rkd_fastai.cli.main import main, number
from rkd_fastai.models import cifar_resnet18
from rkd_fastai.recipes import Recipe, all_recipes, kind_recipes
from rkd_fastai.teachers import Teacher

small = ('--data', 'digits', '--width', '1/16', '--n', 64, '--bs', 64, '--epochs', 1)
hows = [*kind_recipes, *(k for k,r in all_recipes.items() if not r.needs_teacher)]
distilling = [k for k,r in all_recipes.items() if r.needs_teacher]

def rkd(*args): main([str(a) for a in args])
def card_of(folder): return json.loads((folder/'card.json').read_text())

def says(*args):
    "The one line that `args` end in"
    with pytest.raises(SystemExit) as e: rkd(*args)
    assert isinstance(e.value.code,
                      str) and e.value.code.startswith('rkd: error: ') and '\n' not in e.value.code, e.value.code
    return e.value.code

@pytest.fixture
def fits(monkeypatch):
    "The (recipe, learner) of each run"
    seen, fit = [], Recipe.fit
    def spy(self, learn, *args, **kwargs):
        seen.append((self, learn))
        return fit(self, learn, *args, **kwargs)
    monkeypatch.setattr(Recipe, 'fit', spy)
    return seen

@pytest.fixture
def planned(monkeypatch, tmp_path):
    "Function: card and learner of a run that is cut off before its first epoch"
    def plan(*args, out=tmp_path/'planned'):
        seen = []
        def stop(self, learn, *args, **kwargs): seen.append((learn, args)); raise KeyboardInterrupt
        monkeypatch.setattr(Recipe, 'fit', stop)
        with pytest.raises(SystemExit, match='130'): rkd(*args, '--out', out)
        (learn, (n_epoch, lr)), card = seen[0], card_of(out)
        assert (n_epoch, lr) == (card['epochs'], card['lr']) # what is said is what is done
        return card, learn
    return plan

def attack_of(learn): return next(cb for cb in learn.cbs if isinstance(cb, RobustCallback)).attack

@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'teacher'
    rkd('train', *small, '--steps', 1, '--out', out)
    return out

common_keys = {'seed', 'data', 'data_path', 'size', 'bs', 'n', 'synthetic', 'frac', 'arch', 'width', 'epochs', 'lr',
               'eps', 'steps', 'keep', 'compile', 'bf16', 'n_in', 'n_out', 'vocab', 'images', 'held_out', 'source',
               'method', 'attack', 'last_epoch', 'versions'}
settings = dict(trades=dict(beta=6.), wang_trades=dict(beta=5.), trades_official=dict(beta=6.))

@pytest.mark.few(4)
@pytest.mark.parametrize('how, lr', list(zip(hows, [ # 64 images: one batch
    .1]*5 + [.4*64/1024, .1, .4*64/1024, .2*64/512, .2*64/512, .1, .2])))
def test_every_way_to_train(how, lr, tmp_path, fits, capsys):
    "One epoch, a student of it, and what it is measured by"
    rkd('train', *small, '--how', how, '--out', tmp_path/'teacher')
    card, (recipe, learn) = card_of(tmp_path/'teacher'), fits[0]
    assert set(card) == common_keys | {'how'} | set(settings.get(how, {}))
    assert (card['lr'] == pytest.approx(lr)
            and (card['bs'], card['n'], card['n_out'], card['n_in'], card['how'], card['epochs'])
            == (64, 64, 10, 1, how, 1))
    assert len(learn.dls.train_ds) == 64 and learn.dls.train.bs == 64 and card['frac'] is None
    assert ((card['source'], card['method'], card['attack']) == (recipe.source, recipe.method, repr(recipe.attack))
            and {k: card[k] for k in settings.get(how, {})} == settings.get(how, {}))
    assert (set(card['last_epoch']) == {'train_loss', 'valid_loss', 'accuracy', 'robust_accuracy'}
            and all(np.isfinite(v) for v in card['last_epoch'].values()))
    assert (learn.recorder.lrs[0] == pytest.approx(lr*recipe.schedule(0., 1))
            and ('catastrophic_overfitting' in dir(learn)) == (how in ('ffgsm', 'fast_at')))
    rkd('distill', *small, '--steps', 1, '--teacher', tmp_path/'teacher', '--out', tmp_path/'student')
    student = card_of(tmp_path/'student')
    assert (set(student) == common_keys | {'teacher', 'betas', 'recipe', 'alpha', 'lam', 'T'}
            and student['teacher'] == [str(tmp_path/'teacher')])
    assert (student['recipe'], student['method'], student['alpha'], student['lr']) == ('paper_student', 'akd', .8, .21)
    rkd('evaluate', tmp_path/'student', '--attacks', 'clean,fgsm', '--n', 20)
    assert {p.name for p in (tmp_path/'teacher').iterdir()} == {'card.json', 'epoch_1.json', 'epoch_1.pth',
                                                                'history.csv', 'model.pth'}

@pytest.mark.parametrize('recipe, says', [
    ('paper_student', dict(method='akd', lr=.21, alpha=.8, lam=None, T=None)),
    ('rslad_official', dict(method='rslad', lr=.01, alpha=1., lam=5/6, T=None)),
    ('ard_official', dict(method='ard', lr=.01, alpha=1., lam=1., T=30.))])
def test_every_way_to_distil(recipe, says, teacher, tmp_path, fits):
    rkd('distill', *small, '--recipe', recipe, '--teacher', teacher, '--out', tmp_path/'student')
    card, (_, learn) = card_of(tmp_path/'student'), fits[0]
    assert {k: card[k] for k in says} == says
    assert card['attack'] == repr(attack_of(learn)) == repr(all_recipes[recipe].attack) and card['epochs'] == 1
    cb = next(cb for cb in learn.cbs if isinstance(cb, RobustCallback))
    assert all(getattr(cb, k) == v for k,v in says.items() if k in ('alpha', 'lam', 'T') and v is not None)
    model, again = load_run(tmp_path/'student')
    assert again == card and all(torch.equal(v, learn.model.state_dict()[k])
                                 for k,v in model.members[0].model.state_dict().items())

def test_names_are_covered():
    assert len(hows) == 12 and distilling == ['paper_student', 'rslad_official', 'ard_official']

@pytest.mark.parametrize('args, bs, lr, epochs', [ # 1,437 images
    (('--how', 'at'), 128, .1, 100), (('--how', 'at+'), 125, .4*125/1024, 400),
    (('--how', 'at+', '--bs', 100), 100, .4*100/1024, 400), (('--how', 'wang_trades', '--bs', 256), 256, .1, 400),
    (('--how', 'at+', '--lr', .3), 125, .3, 400), (('--how', 'at+', '--lr', 0), 125, 0., 400),
    (('--how', 'fast_at'), 128, .2, 15), (('--how', 'trades_official', '--n', 30), 7, .1, 76),
    (('--how', 'at', '--bs', 1437), 1437, .1, 100)])
def test_numbers_are_in_the_text(args, bs, lr, epochs, planned):
    "The recipe's batch size where eight of them fill an epoch, a rate in proportion where it says so, and its epochs"
    card, learn = planned('train', '--data', 'digits', '--width', '1/16', *args)
    assert ((card['bs'], card['lr'], card['epochs']) == (bs, pytest.approx(lr), epochs)
            and learn.dls.train.bs == bs == learn.dls.valid.bs)

@pytest.mark.parametrize('how, args, attack', [
    ('at', ('--eps', '16/255'), PGD(16/255)), ('at', ('--steps', 3), PGD(steps=3)),
    ('at', ('--eps', '16/255', '--steps', 3), PGD(16/255, steps=3)),
    ('ffgsm', ('--eps', '16/255'), FFGSM(16/255)),
    ('lat', ('--eps', '16/255', '--steps', 2), PGD(4/255, steps=2)),
    ('trades_official', ('--eps', '.062'), PGD(.062, steps=10, step_size=.014, random_start=.001, objective='kl')),
    ('at', ('--eps', 0), PGD(0.)), ('st', ('--eps', '16/255', '--steps', 3), None),
    ('fast_at', ('--eps', '4/255'), FFGSM(4/255))])
def test_eps_and_steps_reach_the_attack(how, args, attack, planned):
    "And the accuracy that is watched; `lat` trains at a quarter of the radius"
    card, learn = planned('train', *small, '--how', how, *args)
    if attack is None: assert not hasattr(next(cb for cb in learn.cbs if isinstance(cb, RobustCallback)), 'attack')
    else: assert repr(attack_of(learn)) == repr(attack)
    eps = number(str(dict(zip(args[::2], args[1::2])).get('--eps', '8/255')))
    assert (card['eps'] == pytest.approx(eps) and learn.metrics[1].attack.eps == pytest.approx(eps)
            and card['attack'] == repr(attack))

def test_attack_stays_in_its_radius(tmp_path, monkeypatch):
    "What the network is trained on under `--eps`, `--steps`: pixels within eps, and no further than the steps go"
    seen, images = [], RobustCallback.before_batch
    def spy(self):
        images(self)
        if self.learn.training: seen.append((self.xb[0] - self.clean_xb[0]).abs().max().item())
    monkeypatch.setattr(RobustCallback, 'before_batch', spy)
    for how,eps,far in (('at', '.2', .2), ('lat', '.2', .05), ('st', '.2', 0.)):
        rkd('train', *small, '--how', how, '--eps', eps, '--out', tmp_path/how)
        assert seen.pop() == pytest.approx(far, abs=1e-6) and not seen

@pytest.mark.parametrize('args, method, settings, attack', [
    (('--alpha', '3/10', '--T', 2), 'akd', dict(alpha=.3, T=2.), 'ce'),
    (('--method', 'rslad', '--lam', '.5'), 'rslad', dict(alpha=.8, lam=.5), 'ce'),
    (('--method', 'ckd', '--lam', '.5', '--T', 4), 'ckd', dict(lam=.5, T=4.), None),
    (('--recipe', 'ard_official', '--T', 5, '--lam', .9), 'ard', dict(alpha=1., lam=.9, T=5.), 'ce'),
    (('--recipe', 'ard_official', '--method', 'ckd'), 'ckd', dict(lam=1., T=30.), None),
    (('--recipe', 'rslad_official', '--method', 'akd', '--alpha', 0), 'akd', dict(alpha=0.), 'kl')])
def test_settings_reach_the_method(args, method, settings, attack, teacher, planned):
    card, learn = planned('distill', *small, '--teacher', teacher, *args)
    cb = next(cb for cb in learn.cbs if isinstance(cb, RobustCallback))
    assert cb.name == method == card['method']
    for k,v in settings.items(): assert getattr(cb, k) == card[k] == pytest.approx(v)
    assert attack is None and card['attack'] == 'None' or cb.attack.objective == attack

@pytest.mark.parametrize('args, line', [
    (('--method', 'akd', '--lam', .5), '`--lam` does not apply to akd'),
    (('--lam', .5), '`--lam` does not apply to akd'),
    (('--method', 'ckd', '--alpha', .5), '`--alpha` does not apply to ckd'),
    (('--recipe', 'ard_official', '--method', 'akd', '--lam', .5), '`--lam` does not apply to akd'),
    (('--alpha', 2), '`--alpha`'), (('--T', 0), '`--T`'),
    (('--recipe', 'rslad_official', '--lam', 1.5), '`--lam`'),
    (('--bs', 65), '`--bs` must be from 1 to 64'), (('--bs', 0), '`--bs` must be from 1'), (('--frac', .5), '`--frac`'),
    (('--synthetic', 'no.npz'), 'synthetic'), (('--synthetic', 'no.npz', '--frac', .5), 'no.npz'),
    (('--steps', -1), '`--steps`'), (('--eps', -1), '`--eps`'), (('--epochs', 0), '`--epochs`'),
    (('--keep', 0), '`--keep`'), (('--betas', .5, .5), '`--betas`'), (('--arch', 'wrn-11-1'), '`depth`')])
def test_mistakes_in_distilling(args, line, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert line in says('distill', *small, '--teacher', teacher, '--out', tmp_path/'out', *args)
    assert not (tmp_path/'out').exists() or not list((tmp_path/'out').iterdir())

@pytest.mark.parametrize('args, line', [
    (('--n', 1438), '`--n` must be from 1 to 1437'), (('--n', 0), '`--n` must be'),
    (('--n', 10, '--bs', 11), '`--bs` must be from 1 to 10'),
    (('--bs', 1438), '`--bs` must be from 1 to 1437'),
    (('--how', 'ffgsm', '--steps', 2), 'FFGSM always takes one step'),
    (('--how', 'fast_at', '--steps', 2), 'FFGSM always takes one step'),
    (('--how', 'at+', '--frac', .5), '`--frac`')])
def test_mistakes_in_training(args, line, tmp_path):
    assert line in says('train', '--data', 'digits', '--width', '1/16', '--epochs', 1, *args, '--out', tmp_path/'out')

@pytest.mark.parametrize('args', [
    ('train', '--how', 'madry'), ('train', '--how', 'rslad_official'), ('train', '--how', 'paper_student'),
    ('train', '--alpha', .5), ('train', '--frac', 'half'), ('train', '--eps', '8/0'), ('train', '--n', 2.5),
    ('distill', '--teacher', 't', '--recipe', 'fast_at'), ('distill', '--teacher', 't', '--recipe', 'rslad'),
    ('distill', '--teacher', 't', '--method', 'st'), ('distill',), ('distil',)])
def test_wrong_names_are_usage_errors(args, tmp_path, capsys):
    with pytest.raises(SystemExit) as e: rkd(*args, '--out', tmp_path/'out')
    assert e.value.code == 2 and 'Usage: rkd' in capsys.readouterr().err and not (tmp_path/'out').exists()


# --- fewer images, and synthetic ones ---

@pytest.fixture
def npz(tmp_path):
    np.savez(tmp_path/'syn.npz', image=np.full((30,8,8), 255, np.uint8), label=np.arange(30) % 10)
    return tmp_path/'syn.npz'

@pytest.mark.parametrize('args, frac, share', [
    (('--how', 'at+'), .7, 14), (('--how', 'at+', '--frac', '1/2'), .5, 10), (('--how', 'at', '--frac', .25), .25, 5),
    (('--how', 'st', '--frac', .25), .25, 5), (('--how', 'wang_trades'), .7, 14)])
def test_synthetic(args, frac, share, npz, tmp_path, fits):
    "White images among digits, so many in each batch of 20; of 60 real ones an epoch has 3 batches"
    rkd('train', '--data', 'digits', '--width', '1/16', '--n', 60, '--bs', 20, '--epochs', 1, '--synthetic', npz,
        *args, '--out', tmp_path/'out')
    card, learn = card_of(tmp_path/'out'), fits[0][1]
    whites = [int((x.flatten(1).quantile(.5, 1) == 1).sum()) for x,_ in learn.dls.train]
    assert whites == [share]*3 and (card['frac'], card['synthetic'], card['n']) == (frac, str(npz), 60)
    assert card['last_epoch']['accuracy'] >= 0 and len(learn.dls.valid_ds) == 360

def test_students_learn_from_synthetic_images_too(npz, teacher, tmp_path, fits):
    rkd('distill', *small, '--synthetic', npz, '--frac', .5, '--teacher', teacher, '--out', tmp_path/'out')
    assert fits[0][1].dls.train.frac == .5 == card_of(tmp_path/'out')['frac']

@pytest.mark.parametrize('arrays, line', [
    (dict(image=np.zeros((4,8,8), np.uint8), label=np.array([0,1,2,10])), '10 classes'),
    (dict(image=np.zeros((4,9,9), np.uint8), label=np.arange(4)), 'shape'),
    (dict(images=np.zeros((4,8,8), np.uint8)), 'no array `image`'),
    (dict(image=np.zeros((4,8,8)), label=np.arange(4)), 'uint8')])
def test_unfit_synthetic_images(arrays, line, tmp_path):
    np.savez(tmp_path/'bad.npz', **arrays)
    assert line in says('train', *small, '--how', 'at+', '--synthetic', tmp_path/'bad.npz', '--out', tmp_path/'out')
    assert '`--frac 0.7`: add it, or remove `--synthetic`' in says(
        'train', *small, '--how', 'at', '--synthetic', tmp_path/'bad.npz', '--out', tmp_path/'out')

def test_n_is_the_seeds(tmp_path, planned):
    "The same images for the same seed"
    def images(seed, out):
        learn = planned('train', '--data', 'digits', '--width', '1/16', '--n', 40, '--seed', seed, out=tmp_path/out)[1]
        return sorted(x.numpy().tobytes() for x,_ in learn.dls.train_ds)
    assert images(1, 'a') == images(1, 'b') != images(2, 'c')


# --- published files ---

def write_idx(path, a): path.write_bytes(gzip.compress(bytes([0, 0, 8, a.ndim]) + struct.pack(f'>{a.ndim}i',
    *a.shape) + a.astype(np.uint8).tobytes()))

@pytest.fixture
def fashion(tmp_path):
    "Fashion-MNIST's four files with few images in them"
    rng, folder = np.random.default_rng(0), tmp_path/'fashion'
    folder.mkdir()
    for split,n in (('train', 100), ('t10k', 30)):
        write_idx(folder/f'{split}-images-idx3-ubyte.gz', rng.integers(0, 256, (n,28,28)))
        write_idx(folder/f'{split}-labels-idx1-ubyte.gz', np.arange(n) % 10)
    return folder

def test_fashion_mnist_files(fashion, tmp_path, planned):
    "From the published files to a number; 90 of the 100 images are for training, fewer than a usual batch"
    common = ('--data', 'fashion_mnist', '--data-path', fashion, '--width', '1/16')
    rkd('train', *common, '--n', 32, '--epochs', 1, '--steps', 1, '--out', tmp_path/'out')
    card = card_of(tmp_path/'out')
    assert ((card['n_in'], card['n_out'], card['bs'], card['data_path'], card['vocab'][1])
            == (1, 10, 8, str(fashion), 'Trouser'))
    whole, learn = planned('train', *common)
    assert whole['bs'] == 22 and len(learn.dls.train_ds) == 90 and len(learn.dls.valid_ds) == 10

@pytest.mark.parametrize('name', [f'{s}-{k}-ubyte' for s in ('train', 't10k') for k in ('images-idx3', 'labels-idx1')])
def test_missing_file_is_named(name, fashion, tmp_path):
    (fashion/f'{name}.gz').unlink()
    assert name in says('train', '--data', 'fashion_mnist', '--data-path', fashion, '--epochs', 1,
                        '--out', tmp_path/'out')


# --- killed ---

@pytest.mark.slow
@pytest.mark.parametrize('how, moment', [('at', 0), ('at+', 1), ('at', 2)])
def test_killed_at_any_moment(how, moment, tmp_path):
    "SIGKILL, at a moment of nobody's choice, takes the running epoch and nothing else"
    out, rng = tmp_path/'out', random.Random()
    cmd = [sys.executable, '-W', 'ignore', '-c', 'import sys; from rkd_fastai.cli.main import main; main(sys.argv[1:])',
           'train', '--data', 'digits', '--width', '1/16', '--n', '200', '--bs', '50', '--steps', '1',
           '--epochs', '500', '--how', how, '--out', str(out)]
    with subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        end = time.time() + 120
        while not (out/f'epoch_{1 + 2*moment}.pth').exists():
            assert run.poll() is None and time.time() < end, run.stderr.read()
            time.sleep(.01)
        time.sleep(rng.random()*.3)
        os.kill(run.pid, signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL and not (out/'model.pth').exists()
    net, kept = cifar_resnet18(10, 1/16, 1), sorted(int(p.stem.split('_')[1]) for p in out.glob('epoch_*.pth'))
    assert kept == list(range(1, len(kept)+1)) and len(kept) >= 1 + 2*moment
    rows = (out/'history.csv').read_text().splitlines()[1:]
    # the Recorder logs an epoch just before `KeepEpochs` saves it, so the last row may have no checkpoint
    assert len([r for r in rows if r.count(',') == 5]) - len(kept) in (0, 1)
    for n in kept:
        net.load_state_dict(torch.load(out/f'epoch_{n}.pth', weights_only=True))
        if n == kept[-1] and not (out/f'epoch_{n}.json').exists(): continue # killed between the weights and their card
        card = json.loads((out/f'epoch_{n}.json').read_text())
        assert card['epoch'] == n and 0 <= card['robust_accuracy'] <= 1
    assert Teacher.at_epoch(out, 'best', net).vocab == [str(i) for i in range(10)]
    common = ('--data', 'digits', '--width', '1/16', '--n', 64, '--steps', 1)
    rkd('distill', *common, '--epochs', 1, '--teacher', out/f'epoch_{kept[-1]}.pth', '--out', tmp_path/'student')
    assert '--resume' in says('train', *common, '--epochs', 1, '--out', out) # what is there is not lost by mistake
