"What the command line does beyond its notebook: a folder of images, timm networks, and no trace of a failed run."
import io, json, sys
import numpy as np, pytest, torch
from PIL import Image
from conftest import python
from rkd_fastai.all import PGD
from rkd_fastai.cli.main import main
from rkd_fastai.study.run import make_dls

@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for split,n in (('train',8),('valid',4)):
        for c,low in (('dark',0),('bright',150)):
            (tmp_path/'images'/split/c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(low, low+100, (20,20,3), dtype=np.uint8)).save(
                    tmp_path/'images'/split/c/f'{i}.png')
    return tmp_path/'images'

def rkd(*args): main([str(a) for a in args])

def test_folder_and_timm(images, tmp_path, capsys):
    common = ('--data', images, '--size', 32, '--bs', 4, '--epochs', 1, '--steps', 1)
    rkd('train', *common, '--arch', 'test_resnet', '--out', tmp_path/'teacher')
    rkd('distill', *common, '--width', '1/16', '--method', 'rslad', '--teacher', tmp_path/'teacher',
        '--out', tmp_path/'student')
    rkd('evaluate', tmp_path/'student', '--attacks', 'clean,fgsm', '--json', tmp_path/'card.json',
        '--state', tmp_path/'state.json')
    card = json.loads((tmp_path/'card.json').read_text())
    assert card['n'] == 8 and 0 <= card['results']['fgsm']['accuracy'] <= card['results']['clean']['accuracy']
    student = json.loads((tmp_path/'student/card.json').read_text())
    assert (student['n_in'], student['n_out'], student['method'], student['width']) == (3, 2, 'rslad', 1/16)
    assert '1 epoch, ' in capsys.readouterr().out
    rkd('evaluate', tmp_path/'student', '--attacks', 'clean', '--n', 100)
    assert 'all 8 validation images' in capsys.readouterr().out # more than there are means all

def test_a_student_sees_images_of_its_teachers_size(images, tmp_path):
    "Unless `--size` says otherwise; where the teachers differ it has to"
    common = ('--data', f'{images}/', '--bs', 4, '--epochs', 1, '--steps', 1, '--width', '1/16')
    for size in (16, 24):
        rkd('train', '--data', images, *common[2:], '--how', 'st', '--size', size, '--out', tmp_path/f't{size}')
    size = lambda name: json.loads((tmp_path/name/'card.json').read_text())['size']
    rkd('distill', *common, '--teacher', tmp_path/'t16', '--out', tmp_path/'same')
    rkd('distill', *common, '--teacher', tmp_path/'t16', '--size', 24, '--out', tmp_path/'other')
    assert (size('same'), size('other')) == (16, 24)
    with pytest.raises(SystemExit, match='`--size`'):
        rkd('distill', *common, '--teacher', tmp_path/'t16', '--teacher', tmp_path/'t24', '--out', tmp_path/'two')
    assert not (tmp_path/'two').exists()

def test_a_student_sees_its_teachers_data(images, tmp_path, monkeypatch):
    "Unless `--data` names others; the images held out of it are checked as with `--data`"
    monkeypatch.chdir(tmp_path)
    common = ('--bs', 4, '--epochs', 1, '--steps', 1, '--width', '1/16')
    rkd('train', '--data', 'images/train', '--size', 16, *common, '--out', 'teacher')
    rkd('distill', '--teacher', 'teacher/epoch_1.pth', *common, '--out', 'student')
    teacher,student = (json.loads((tmp_path/f'{k}/card.json').read_text()) for k in ('teacher','student'))
    assert all(teacher[k] == student[k] for k in ('data','data_path','size','vocab','images','held_out'))
    assert student['data'] == 'images/train' and student['held_out']
    rkd('train', '--data', 'digits', *common, '--how', 'st', '--n', 100, '--out', 'digits')
    with pytest.raises(SystemExit, match='different data, images/train and digits: pass .*with `--data`'):
        rkd('distill', '--teacher', 'teacher', '--teacher', 'digits', '--out', 'no')
    (images/'train/dark/0.png').rename(images/'train/dark/9.png')
    (images/'train/bright/0.png').rename(images/'train/bright/9.png')
    (images/'train/dark/1.png').rename(images/'train/dark/a.png')
    with pytest.raises(SystemExit, match='held out now are not those'):
        rkd('evaluate', 'student', '--attacks', 'clean')
    images.rename(tmp_path/'away')
    with pytest.raises(SystemExit, match='teacher was trained on the images in images/train, which is not here: pass'):
        rkd('distill', '--teacher', 'teacher', '--out', 'no')
    assert not (tmp_path/'no').exists()

def test_settings_are_checked_before_the_data(tmp_path):
    rkd('train', '--data', 'digits', '--how', 'st', '--width', '1/16', '--epochs', 1, '--n', 100, '--out', tmp_path/'t')
    for option,data in (('--alpha', 'fashion_sample'), ('--alpha', tmp_path/'nowhere'), ('--T', 'fashion_sample')):
        with pytest.raises(SystemExit, match=f'error: `{option}`'):
            rkd('distill', '--teacher', tmp_path/'t', '--data', data, option, -3, '--out', tmp_path/'s',
                *(('--method', 'ard') if option == '--T' else ()))
    with pytest.raises(SystemExit, match='but the data have .* Choose the data on which the run was trained'):
        rkd('distill', '--teacher', tmp_path/'t', '--data', 'fashion_sample', '--out', tmp_path/'s')

def test_an_accuracy_of_chance_is_told(tmp_path, capsys):
    for epochs,lr in ((1, 0), (3, .1)):
        run = tmp_path/f'{epochs}'
        rkd('train', '--data', 'digits', '--how', 'st', '--width', '1/16', '--epochs', epochs, '--lr', lr, '--out', run)
        rkd('evaluate', run, '--attacks', 'clean')
        assert ('not clearly above that of guessing among 10 classes' in capsys.readouterr().out) == (lr == 0)
        rkd('evaluate', run, '--attacks', 'fgsm', '--n', 10) # it needs the clean accuracy
        assert 'guessing' not in capsys.readouterr().out

def test_a_run_is_attacked_at_its_own_radius(tmp_path, capsys):
    rkd('train', '--data', 'digits', '--how', 'st', '--width', '1/16', '--epochs', 1, '--eps', '25/255',
        '--out', tmp_path/'run')
    def radius(*args):
        rkd('evaluate', tmp_path/'run', '--attacks', 'clean,fgsm', '--n', 20, '--json', tmp_path/'card.json', *args)
        return json.loads((tmp_path/'card.json').read_text())['eps']
    assert (radius(), radius('--eps', '4/255')) == (25/255, 4/255)
    assert radius('--norm', 'L2', '--eps', .5) == .5
    with pytest.raises(SystemExit, match='`--norm L2`.*`--eps`'): radius('--norm', 'L2')
    with pytest.raises(SystemExit, match='remove `--norm`'): radius('--norm', 'L2', '--eps', .5, '--check')
    card = json.loads((tmp_path/'run/card.json').read_text())
    for eps in (None, 'wide'):
        (tmp_path/'run/card.json').write_text(json.dumps(card | dict(eps=eps)))
        assert radius() == 8/255

def test_a_folder_of_images_that_is_elsewhere(images, tmp_path, monkeypatch):
    "A run tells the size its images were made, and where they were; from another folder they have to be named"
    monkeypatch.chdir(tmp_path)
    rkd('train', '--data', 'images', '--how', 'st', '--bs', 4, '--epochs', 1, '--width', '1/16', '--out', 'run')
    assert json.loads((tmp_path/'run/card.json').read_text())['size'] == 64
    rkd('evaluate', 'run', '--attacks', 'clean')
    (tmp_path/'away').mkdir(); monkeypatch.chdir(tmp_path/'away')
    with pytest.raises(SystemExit, match='images in images, which is not here: pass their folder with `--data`'):
        rkd('evaluate', '../run', '--attacks', 'clean')
    rkd('evaluate', '../run', '--attacks', 'clean', '--data', '../images')

def test_the_network_of_a_run_trains_on_and_is_exported(tmp_path):
    "As `load_run`'s does not, which is a teacher"
    from fastai.vision.all import Learner, accuracy
    from rkd_fastai.data.benchmarks import digits_dls
    from rkd_fastai.study.run import load_network, load_run
    rkd('train', '--data', 'digits', '--how', 'st', '--width', '1/16', '--epochs', 1, '--out', tmp_path/'run')
    (network,card),(teacher,_) = load_network(tmp_path/'run'), load_run(tmp_path/'run')
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(network.eval()(x), teacher(x))
    learn = Learner(digits_dls(), network, metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        assert learn.validate()[1] == pytest.approx(card['last_epoch']['accuracy'])
        learn.export()
        learn.to_adversarial(PGD(.1, steps=1)).fit(1)
    assert not torch.equal(network.eval()(x), teacher(x))

def test_commands_that_are_refused(tmp_path):
    "What is no study, what is no folder of one, half an option, and an α that the method turns down leave nothing"
    (tmp_path/'my.toml').write_text('')
    for command,says in ((('study', tmp_path/'nope.toml'), 'no study at .*nope.toml'),
                         (('study', *[tmp_path/'my.toml']*2), 'one study at a time'),
                         (('study', 'report', tmp_path/'my.toml'), 'name the folder of one study')):
        with pytest.raises(SystemExit, match=says): rkd(*command)
    with pytest.raises(SystemExit): rkd('train', '--data', 'digits', '--epoch', 1, '--out', tmp_path/'run')
    assert not (tmp_path/'run').exists()
    rkd('train', '--data', 'digits', '--how', 'st', '--width', '1/16', '--epochs', 1, '--out', tmp_path/'teacher')
    with pytest.raises(SystemExit, match='`--alpha`'):
        rkd('distill', '--data', 'digits', '--teacher', tmp_path/'teacher', '--alpha', 2, '--out', tmp_path/'run')
    assert not (tmp_path/'run').exists()

def test_a_check_that_finds_too_few_images(tmp_path, capsys):
    "Is a line below what was measured"
    rkd('train', '--data', 'digits', '--how', 'st', '--width', '1/16', '--epochs', 1, '--lr', 0,
        '--out', tmp_path/'run')
    rkd('evaluate', tmp_path/'run', '--attacks', 'clean', '--n', 20, '--check')
    printed = capsys.readouterr().out
    assert ('Masked gradients were not looked for: ' in printed and 'of 20 images correctly' in printed
            and 'take more images (`--n`)' in printed and '20 of 360 validation images' in printed)

def test_images_of_one_class(images, tmp_path):
    "All in one folder, or one sub-folder: 100 % would be no merit"
    for folder in (images/'train/dark', images/'train'):
        for f in (images/'train/bright').glob('*'): f.unlink()
        with pytest.raises(SystemExit, match="one class, 'dark'|not in a sub-folder"):
            rkd('train', '--data', folder, '--epochs', 1, '--out', tmp_path/'out')
        assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('args, says', [
    (('train', '--data', 'nowhere'), '`--data`'), (('train', '--data', 'data'), '`data` must be a folder'),
    (('train', '--data', 'digits', '--arch', 'resnet19'), '`--arch`'),
    (('train', '--data', 'digits', '--keep', '0'), '`--keep`'),
    (('train', '--data', 'digits', '--eps', '8'), '8/255'),
    (('train', '--data', 'cifar10', '--data-path', '.'), 'remove `--data-path`'),
])
def test_errors_are_one_line(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: rkd(*args, '--epochs', 1, '--out', tmp_path/'out')
    assert says in e.value.code and e.value.code.startswith('rkd: error: ') and '\n' not in e.value.code
    assert not (tmp_path/'out/model.pth').exists()

def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    from rkd_fastai.cli import commands
    monkeypatch.setattr(commands, 'train', lambda args: __import__('no_such_package'))
    with pytest.raises(SystemExit) as e: rkd('train', '--out', tmp_path/'out')
    assert e.value.code == "rkd: error: No module named 'no_such_package'"

def test_a_run_that_diverges_is_one_line(tmp_path):
    with pytest.raises(SystemExit) as e:
        rkd('train', '--data', 'digits', '--width', '1/16', '--steps', 1, '--n', 300, '--epochs', 2, '--lr', 1e30,
            '--out', tmp_path/'out')
    printed = e.value.code
    assert (printed.startswith('rkd: error: ') and '\n' not in printed and 'lower the learning rate (`--lr`)' in printed
            and 'epoch 1' in printed and 'batch' in printed and 'GradientClip' not in printed)
    assert not (tmp_path/'out/model.pth').exists()

def test_a_teacher_cut_off_is_usable(tmp_path, monkeypatch):
    "Its finished epochs can be distilled from, though the run never ended"
    from rkd_fastai.callback.keep import KeepEpochs
    keep = KeepEpochs.each_epoch
    def die_in_second(self):
        if self.epoch == 1: raise KeyboardInterrupt
        keep(self)
    monkeypatch.setattr(KeepEpochs, 'each_epoch', die_in_second)
    common = ('--data', 'digits', '--width', '1/16', '--steps', 1)
    with pytest.raises(SystemExit, match='130'): rkd('train', *common, '--epochs', 3, '--out', tmp_path/'teacher')
    assert not (tmp_path/'teacher/model.pth').exists()
    for command in (('evaluate', tmp_path/'teacher'),
                    ('distill', *common, '--teacher', tmp_path/'teacher', '--out', tmp_path/'no')):
        with pytest.raises(SystemExit, match='contains an interrupted run: add `--resume`.*epoch_1.pth'): rkd(*command)
    rkd('distill', *common, '--epochs', 1, '--teacher', tmp_path/'teacher/epoch_1.pth', '--out', tmp_path/'student')
    assert (tmp_path/'student/model.pth').exists()
    for k,v,was in (('--epochs', 4, 3), ('--how', 'st', 'at'), ('--data', 'fashion_sample', 'digits'),
                    ('--lr', .5, .1), ('--eps', '4/255', 8/255)): # said in the words of the command line
        with pytest.raises(SystemExit, match=f'`{k}` is .* here, but {was} in the interrupted run.*another `--out`'):
            rkd('train', *common, '--epochs', 3, k, v, '--out', tmp_path/'teacher', '--resume')
    with pytest.raises(SystemExit, match='`--data` is fashion_sample'):
        rkd('train', *common, '--data', 'fashion_sample', '--lr', .5, '--epochs', 4, # of several always the same
            '--out', tmp_path/'teacher', '--resume')
    monkeypatch.setattr(KeepEpochs, 'each_epoch', keep)
    rkd('train', *common, '--epochs', 3, '--keep', 2, '--out', tmp_path/'teacher', '--resume')
    assert (tmp_path/'teacher/model.pth').exists()

@pytest.mark.parametrize('name', ['valid','val','test'])
def test_held_out_folder_is_the_validation_set(images, name):
    (images/'valid').rename(images/name)
    dls = make_dls(images, bs=4)
    held = dls.loaders[-1].dataset
    assert [len(dl.dataset) for dl in dls.loaders] == ([13, 3, 8] if name == 'test' else [16, 8])
    assert all(f.parts[-3] == name for f in held.items)

def test_evaluate_fast_and_check(tmp_path, capsys):
    rkd('train', '--data', 'digits', '--how', 'st', '--width', '1/16', '--epochs', 3, '--out', tmp_path/'run')
    rkd('evaluate', tmp_path/'run', '--attacks', 'apgd', '--n', 30, '--fast', '--check', '--json', tmp_path/'card.json')
    assert (json.loads((tmp_path/'card.json').read_text())['results']['apgd']['attack']
            == ['apgd-ce: 100 steps, 1 restart(s), fast search'])
    printed = capsys.readouterr().out
    assert '30 of 360 validation images' in printed
    assert 'larger radius' in printed and ('no sign of masked gradients' in printed or 'not to be trusted' in printed)

def test_a_folder_without_images(tmp_path):
    from rkd_fastai.study.run import make_dls
    (tmp_path/'cat').mkdir()
    with pytest.raises(ValueError, match='has no images: put those of each class into'): make_dls(str(tmp_path))

# --- advice is on commands, not on Python ---

small = ('--data', 'digits', '--width', '1/16', '--steps', 1, '--n', 200)

@pytest.mark.parametrize('keep, says', [(1, r'`rkd distill --teacher {out}/epoch_1.pth` learns from that epoch'),
                                        (2, '`--keep 1` keeps the checkpoint of every epoch')])
def test_robust_overfitting_names_a_command(keep, says, tmp_path, monkeypatch, capsys):
    from rkd_fastai.callback.monitor import RobustOverfitting
    monkeypatch.setattr(RobustOverfitting, 'logged', lambda self: dict(robust_accuracy=.9 - .1*self.epoch))
    rkd('train', *small, '--how', 'st', '--epochs', 2, '--keep', keep, '--out', tmp_path/'run')
    printed = capsys.readouterr().out
    assert 'was 90.0% after epoch 1' in printed and says.format(out=tmp_path/'run') in printed
    assert 'KeepEpochs' not in printed and 'at_epoch' not in printed

def test_a_warning_is_a_line_in_the_words_of_the_command_line(tmp_path, monkeypatch, capsys):
    import warnings
    from rkd_fastai.cli import commands
    accs, formatted = iter([.9, .1]), warnings.formatwarning
    monkeypatch.setattr(warnings, 'showwarning', lambda m, c, f, l, *_: print( # as outside of pytest
        warnings.formatwarning(m, c, f, l), end='', file=sys.stderr))
    monkeypatch.setattr('rkd_fastai.callback.monitor.robust_accuracy', lambda *_: next(accs))
    with warnings.catch_warnings():
        warnings.simplefilter('always', UserWarning) # elsewhere in the tests they are errors
        rkd('train', '--data', 'digits', '--width', '1/16', '--n', 200, '--how', 'ffgsm', '--epochs', 2,
            '--out', tmp_path/'run')
    line, = [l for l in capsys.readouterr().err.splitlines() if 'overfitting' in l]
    assert line.startswith('rkd: warning: catastrophic overfitting') and line.endswith('`--how at` trains on PGD')
    monkeypatch.setattr(commands, 'train', lambda args: warnings.warn('`data_path` is not read'))
    with warnings.catch_warnings():
        warnings.simplefilter('always', UserWarning)
        rkd('train', '--out', tmp_path/'other')
    assert capsys.readouterr().err == 'rkd: warning: `--data-path` is not read\n'
    assert warnings.formatwarning is formatted # Python's own, afterwards

def test_another_teacher_under_resume(tmp_path, monkeypatch):
    "And checkpoints of another run in the folder, whose card is kept"
    from rkd_fastai.callback.resume import Resume
    save = Resume._save
    def interrupt(self): save(self); raise KeyboardInterrupt
    for seed in (1, 2):
        rkd('train', *small, '--how', 'st', '--epochs', 1, '--seed', seed, '--out', tmp_path/f'teacher{seed}')
    student = ('distill', *small, '--out', tmp_path/'run', '--teacher')
    with monkeypatch.context() as m:
        m.setattr(Resume, '_save', interrupt)
        with pytest.raises(SystemExit, match='130'): rkd(*student, tmp_path/'teacher1', '--epochs', 3)
    with pytest.raises(SystemExit) as e: rkd(*student, tmp_path/'teacher2', '--epochs', 3, '--resume')
    assert e.value.code == (f'rkd: error: the teacher is not the same as in the interrupted run in {tmp_path}/run: '
                            'restore what the run had, or choose another `--out`')
    for option,says in ((('--compile',), '`--compile` is given here, but left out in the interrupted run'),
                        (('--data-path', tmp_path), None)):
        if says:
            with pytest.raises(SystemExit, match=says):
                rkd(*student, tmp_path/'teacher1', '--epochs', 3, '--resume', *option)
        else: rkd(*student, tmp_path/'teacher1', '--epochs', 3, '--resume', *option) # the data are the same
    (tmp_path/'run/model.pth').unlink()
    card = (tmp_path/'run/card.json').read_text()
    for epochs in (2, 3, 4):
        with pytest.raises(SystemExit, match='`--out` .*run contains checkpoints of another run, '
                                             'up to epoch_3.pth: delete them'):
            rkd(*student, tmp_path/'teacher1', '--epochs', epochs)
    assert (tmp_path/'run/card.json').read_text() == card

def test_what_is_no_run_is_told_what_to_do(tmp_path):
    from fastai.vision.all import Learner
    from rkd_fastai.all import cifar_resnet18, digits_dls
    Learner(digits_dls(), cifar_resnet18(10, 1/16, 1), path=tmp_path).save('mine')
    with pytest.raises(SystemExit, match=r'no card.json beside .*mine.pth`.*measure it with `learn.robustness\(\)`'):
        rkd('evaluate', tmp_path/'models/mine.pth')
    with pytest.raises(SystemExit, match='nowhere` does not exist: pass the folder of a run, or a checkpoint in it'):
        rkd('evaluate', tmp_path/'nowhere')

def test_a_damaged_checkpoint_is_not_the_cards_fault(tmp_path):
    rkd('train', *small, '--how', 'st', '--epochs', 1, '--out', tmp_path/'run')
    (tmp_path/'run/bad.pth').write_bytes((tmp_path/'run/model.pth').read_bytes()[:1000])
    with pytest.raises(SystemExit) as e: rkd('evaluate', tmp_path/'run/bad.pth')
    assert 'bad.pth` is truncated' in e.value.code and 'card.json' not in e.value.code

# --- consoles that cannot show every character ---

@pytest.fixture
def console(monkeypatch):
    "Factory: standard output becomes a console of this encoding, whose text the returned function gives"
    def make(encoding):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors='strict')
        monkeypatch.setattr(sys, 'stdout', out)
        return lambda: (out.flush(), out.buffer.getvalue().decode(encoding))[1]
    return make
narrow = pytest.mark.parametrize('encoding', ['cp1252', 'ascii'])

@pytest.mark.slow
def test_a_study_on_a_narrow_console(console, tmp_path):
    "Trains, prints its rows and its report, α and all, and then the help"
    (tmp_path/'s.toml').write_text('data = "digits"\nn = 64\nbs = 32\nwidth = "1/16"\neps = "25/255"\n'
                                   'epochs = 1\nteacher_epochs = 1\n'
                                   '[measure]\nattacks = ["clean", "fgsm"]\nn = 20\n'
                                   '[[grid]]\nmethod = "akd"\nalpha = [0.5, 1.0]\n', encoding='utf8')
    printed = console('cp1252')
    rkd('study', tmp_path/'s.toml', '--out', tmp_path/'s')
    assert '2/2' in printed() and 'alpha' in printed() and 'α' not in printed()
    with pytest.raises(SystemExit) as e: rkd('distill', '--help')
    assert e.value.code == 0

@narrow
def test_callbacks_on_a_narrow_console(encoding, console, tmp_path):
    "A script that never comes by `rkd`: the bar, a metric of the user's own name, and what monitors say"
    from fastai.vision.all import Learner, ValueMetric
    from rkd_fastai.all import RobustOverfitting, cifar_resnet18, digits_dls
    from rkd_fastai.callback.progress import Line, one_line
    printed, scores = console(encoding), iter([.9, .5])
    line = Line('ε = 8/255')
    line.every = 0
    line.update(.5, 'pgd20 ≤ 54 %')
    line.finish('→ 猫')
    for text in ('eps = 8/255', '##########..........', '<= 54 %', '-> ?'): assert text in printed()
    learn = Learner(digits_dls(bs=512), cifar_resnet18(10, 1/16, 1),
                    metrics=ValueMetric(lambda: next(scores), 'accuracy_ε'),
                    cbs=RobustOverfitting('accuracy_ε'), path=tmp_path)
    with one_line(learn, 'µ'): learn.fit(2, 0.)
    assert 'robust overfitting: accuracy_eps was 90.0%' in printed()

@pytest.mark.parametrize('argv, code', [(['--help'], 0), (['--version'], 0), (['train', '--help'], 0), ([], 2),
                                        (['trian'], 2), (['train', '--epoch', '3'], 2)])
def test_help_and_typos_do_not_wait_for_pytorch(argv, code):
    "Nothing that takes long to import is imported before a command runs"
    slow = ['torch', 'fastai', 'numpy', 'pandas', 'rich', 'tabulate']
    assert python(f'''
        import contextlib, io, sys
        from rkd_fastai.cli.main import main
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): main({argv})
        except SystemExit as e: print(e.code or 0, sorted(set(sys.modules) & {{*{slow}}}))
    ''') == f'{code} []'

class Tty(io.StringIO):
    def isatty(self): return True

def test_messages_in_a_fit_have_lines_of_their_own(monkeypatch):
    "What a monitor prints does not stand at the end of the progress line"
    from fastai.vision.all import Learner, ValueMetric
    from rkd_fastai.all import RobustOverfitting, cifar_resnet18, digits_dls
    from rkd_fastai.callback import progress
    scores, terminal = iter([.9, .5, .4]), Tty()
    monkeypatch.setattr(sys, 'stdout', terminal)
    monkeypatch.setattr(progress.Line, 'every', property(lambda self: 0, lambda self, seconds: None), raising=False)
    learn = Learner(digits_dls(bs=512), cifar_resnet18(10, 1/16, 1), cbs=RobustOverfitting('accuracy'),
                    metrics=ValueMetric(lambda: next(scores), 'accuracy'))
    with progress.one_line(learn, 'digits'): learn.fit(3, 0.)
    lines = [line.rpartition('\r\033[K')[2] for line in terminal.getvalue().split('\n')] # as the terminal shows them
    assert [line.split()[0] for line in lines if line] == ['robust', 'digits'] and terminal.getvalue().count('█')

@pytest.mark.parametrize('argv', [['--help'], ['train', '--help'], ['distill', '-h'], ['evaluate', '--help'],
                                  ['study', '--help'], ['demo', '--help']])
def test_help_is_a_page_in_a_terminal_and_plain_text_elsewhere(argv, monkeypatch):
    for stream in (Tty(), io.StringIO()):
        monkeypatch.setattr(sys, 'stdout', stream)
        with pytest.raises(SystemExit) as e: rkd(*argv)
        printed = stream.getvalue()
        assert e.value.code == 0 and 'Usage: ' in printed and ('╭' in printed) == stream.isatty()
    assert printed.isascii() and '\033' not in printed
    if argv == ['--help']: # so says `rkd` alone, with the exit code of an error
        with pytest.raises(SystemExit, match='2'): rkd()
        assert stream.getvalue() == 2*printed

@pytest.mark.parametrize('command, says', [
    ('train', ['just one folder per class', 'a fifth of the training images becomes', 'resized and cropped']),
    ('distill', ['Default: the data of the teacher', 'Default: that of the teacher, else it is found']),
    ('evaluate', ['Default: the data of the run', 'Default: that of the run, else it is found']),
    ('study', ['report FOLDER writes the tables and figures of a study again'])])
def test_help_says(command, says, capsys):
    with pytest.raises(SystemExit): rkd(command, '--help')
    printed = ' '.join(capsys.readouterr().out.split())
    for text in says: assert text in printed

@pytest.mark.parametrize('argv, says', [
    (['distil'], "No such command 'distil'. Did you mean 'distill'?"), (['--verson'], "Did you mean '--version'?"),
    (['train', '--epoch', 3], "Did you mean '--epochs'?"), (['train', '--how', 'att'], "did you mean 'at'?"),
    (['distill', '--teacher', 't'], "Missing option '--out'"), (['train', '--n', 2.5], "'2.5' is not a whole number"),
    (['train', '--eps', '8/0'], "'--eps': '8/0' is not a number or a fraction such as 8/255")])
def test_usage_errors_say_what_is_right(argv, says, capsys):
    with pytest.raises(SystemExit, match='2'): rkd(*argv)
    printed = capsys.readouterr()
    assert printed.out == '' and printed.err.startswith('Usage: rkd') and "Try 'rkd" in printed.err
    line = printed.err.splitlines()[-1]
    assert line.startswith('rkd: error: ') and says in line

def test_an_error_is_red_in_a_terminal(tmp_path, monkeypatch):
    for args,code in ((('evaluate', tmp_path/'nowhere'), 1), (('evaluat',), 2)):
        monkeypatch.setattr(sys, 'stderr', Tty())
        with pytest.raises(SystemExit) as e: rkd(*args)
        assert e.value.code == code and '\033[31mrkd: error: ' in sys.stderr.getvalue()

@pytest.mark.parametrize('betas', [('--betas', .25, '3/4'), ('--betas', '1/4', '--betas', .75), None])
def test_weights_of_teachers(betas, monkeypatch):
    "After one option or each after its own"
    from rkd_fastai.cli import main as cli
    seen = []
    monkeypatch.setattr(cli, '_start', lambda command, options: seen.append(options))
    rkd('distill', '--teacher', 'a', *(betas or ()), '--teacher', 'b', '--out', 'run')
    assert seen[0]['teacher'] == ['a','b'] and seen[0]['betas'] == (betas and [.25, .75])

def test_results_are_a_table_in_a_terminal(tmp_path, monkeypatch):
    rkd('train', *small, '--how', 'st', '--epochs', 1, '--out', tmp_path/'run')
    monkeypatch.setattr(sys, 'stdout', Tty())
    rkd('evaluate', tmp_path/'run', '--attacks', 'clean,fgsm', '--n', 20)
    printed = sys.stdout.getvalue()
    assert '─' in printed and 'fgsm' in printed and '20 of 360 validation images' in ' '.join(printed.split())
