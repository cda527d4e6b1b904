"What the command line does beyond its notebook: a folder of images, timm networks, and no trace of a failed run."
import json
import numpy as np, pytest
from PIL import Image
from rkd_fastai.cli import main, make_dls

@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for split,n in (('train',8),('valid',4)):
        for c,low in (('dark',0),('bright',150)):
            (tmp_path/'images'/split/c).mkdir(parents=True)
            for i in range(n): Image.fromarray(rng.integers(low, low+100, (20,20,3), dtype=np.uint8)).save(tmp_path/'images'/split/c/f'{i}.png')
    return tmp_path/'images'

def rkd(*args): main([str(a) for a in args])

def test_folder_and_timm(images, tmp_path, capsys):
    common = ('--data', images, '--size', 32, '--bs', 4, '--epochs', 1, '--steps', 1)
    rkd('train', *common, '--arch', 'test_resnet', '--out', tmp_path/'teacher')
    rkd('distill', *common, '--width', '1/16', '--method', 'rslad', '--teacher', tmp_path/'teacher', '--out', tmp_path/'student')
    rkd('evaluate', tmp_path/'student', '--attacks', 'clean,fgsm', '--json', tmp_path/'card.json', '--state', tmp_path/'state.json')
    card = json.loads((tmp_path/'card.json').read_text())
    assert card['n'] == 8 and 0 <= card['results']['fgsm']['accuracy'] <= card['results']['clean']['accuracy']
    student = json.loads((tmp_path/'student/card.json').read_text())
    assert (student['n_in'], student['n_out'], student['method'], student['width']) == (3, 2, 'rslad', 1/16)
    assert 'epochs' in capsys.readouterr().out

@pytest.mark.parametrize('args, says', [
    (('train', '--data', 'nowhere'), '`--data`'), (('train', '--data', 'digits', '--arch', 'resnet19'), '`--arch`'),
    (('train', '--data', 'digits', '--eps', '8'), '8/255'), (('train', '--data', 'cifar10', '--data-path', '.'), 'cifar-10-batches-py'),
])
def test_errors_are_one_line(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: rkd(*args, '--epochs', 1, '--out', tmp_path/'out')
    assert says in e.value.code and e.value.code.startswith('rkd: error: ') and '\n' not in e.value.code
    assert not (tmp_path/'out/model.pth').exists()

def test_a_training_that_diverges_is_one_line(tmp_path):
    with pytest.raises(SystemExit) as e: rkd('train', '--data', 'digits', '--width', '1/16', '--steps', 1, '--n', 300, '--epochs', 2, '--lr', 1e30, '--out', tmp_path/'out')
    said = e.value.code
    assert said.startswith('rkd: error: ') and '\n' not in said and 'learning rate' in said and 'epoch 1' in said and 'batch' in said
    assert not (tmp_path/'out/model.pth').exists()

def test_a_teacher_cut_off_is_usable(tmp_path, monkeypatch):
    "Its finished epochs can be distilled from, though the run never ended"
    from rkd_fastai.callback.monitor import KeepEpochs
    keep = KeepEpochs.each_epoch
    def die_in_second(self):
        if self.epoch == 1: raise KeyboardInterrupt
        keep(self)
    monkeypatch.setattr(KeepEpochs, 'each_epoch', die_in_second)
    common = ('--data', 'digits', '--width', '1/16', '--steps', 1)
    with pytest.raises(SystemExit, match='interrupted'): rkd('train', *common, '--epochs', 3, '--out', tmp_path/'teacher')
    assert not (tmp_path/'teacher/model.pth').exists()
    rkd('distill', *common, '--epochs', 1, '--teacher', tmp_path/'teacher/epoch_1.pth', '--out', tmp_path/'student')
    assert (tmp_path/'student/model.pth').exists()

@pytest.mark.parametrize('name', ['valid','val','test'])
def test_held_out_folder_is_the_validation_set(images, name):
    (images/'valid').rename(images/name)
    dls = make_dls(images, bs=4)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (16, 8)
    assert all(f.parts[-3] == name for f in dls.valid_ds.items)

def test_evaluate_fast_and_check(tmp_path, capsys):
    rkd('train', '--data', 'digits', '--how', 'st', '--width', '1/16', '--epochs', 2, '--out', tmp_path/'run')
    rkd('evaluate', tmp_path/'run', '--attacks', 'apgd', '--n', 30, '--fast', '--check', '--json', tmp_path/'card.json')
    assert json.loads((tmp_path/'card.json').read_text())['results']['apgd']['attack'] == ['apgd-ce: 100 steps, 1 restart(s), fast search']
    said = capsys.readouterr().out
    assert '30 images' in said
    assert 'larger radius' in said and ('no sign of masked gradients' in said or 'not to be trusted' in said)

def test_a_folder_without_images(tmp_path):
    from rkd_fastai.runs import make_dls
    (tmp_path/'cat').mkdir()
    with pytest.raises(ValueError, match='no images in .*sub-folder of them for each class'): make_dls(str(tmp_path))
