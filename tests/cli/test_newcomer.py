"""What a newcomer does with a folder of images by the page on the
command line alone: train, distil, be interrupted, go on, evaluate,
compare in a study, read its report."""
import csv, json
import numpy as np, pytest, torch
from PIL import Image
from sklearn.datasets import load_digits
from rkd_fastai.callback.resume import Resume
from rkd_fastai.cli.main import main
from rkd_fastai.study.run import load_run, make_dls

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "The digits as PNG files: `train/0/…`, `valid/0/…`, `test/0/…`"
    root,o = tmp_path_factory.mktemp('newcomer')/'photos',load_digits()
    for i,(img,c) in enumerate(zip(o.images, o.target)):
        split = 'train' if i < 600 else 'valid' if i < 900 else 'test' if i < 1200 else None
        if split is None: break
        (root/split/str(c)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((img*255/16).round().astype(np.uint8)).save(root/split/str(c)/f'{i}.png')
    return root

def rkd(*args): main([str(a) for a in args])
small = ('--size', 8, '--width', '1/16', '--eps', '25/255', '--bs', 50, '--steps', 2)

@pytest.fixture(scope='module')
def teacher(photos):
    out = photos.parent/'runs/teacher'
    rkd('train', '--data', photos, '--how', 'at', '--epochs', 6, '--out', out, *small)
    return out

def history(run):
    return [{k: v for k,v in r.items() if k != 'time'}
            for r in csv.DictReader((run/'history.csv').read_text().splitlines())]

def test_train(teacher, photos):
    "Each epoch has its checkpoint, and the card says what was trained on"
    card = json.loads((teacher/'card.json').read_text())
    assert card['images'] == dict(train=600, valid=300, test=300) and card['vocab'] == [str(i) for i in range(10)]
    assert ({f'epoch_{i}.pth' for i in range(1, 7)} <= {f.name for f in teacher.iterdir()}
            and float(history(teacher)[-1]['accuracy']) > .7)

def test_interrupted_and_resumed(teacher, photos, monkeypatch, capsys):
    "A student of an early epoch; Ctrl-C after the second epoch costs nothing, and the teacher's files stay as they are"
    before = {f.name: f.read_bytes() for f in teacher.iterdir()}
    student = ('distill', '--data', photos, '--teacher', teacher/'epoch_4.pth', '--epochs', 3, *small)
    whole,cut = (photos.parent/f'runs/{k}' for k in ('whole','cut'))
    rkd(*student, '--out', whole)
    save = Resume._save
    def once(self):
        save(self)
        if self.epochs == 2: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(Resume, '_save', once)
        with pytest.raises(SystemExit, match='130'): rkd(*student, '--out', cut)
    assert 'with `--resume` continues after the last finished epoch' in capsys.readouterr().err
    with pytest.raises(SystemExit, match='--resume'): rkd(*student, '--out', cut)
    rkd(*student, '--out', cut, '--resume')
    a,b = (load_run(run)[0].state_dict() for run in (whole, cut))
    assert all(torch.equal(v, b[k]) for k,v in a.items()) and history(whole) == history(cut)
    assert {f.name: f.read_bytes() for f in teacher.iterdir()} == before

def test_student_sees_images_of_the_teachers_size(teacher, photos, tmp_path, monkeypatch):
    "also where the folder is named in another way, or is another folder; published data have a size of their own"
    from rkd_fastai.cli import commands
    seen = []
    monkeypatch.setattr(commands, '_run', lambda args, *_, **__: seen.append(args.size))
    monkeypatch.chdir(photos.parent)
    for data in (photos, photos.name, f'{photos}/../{photos.name}', tmp_path, 'fashion_sample'):
        rkd('distill', '--data', data, '--teacher', teacher, '--out', tmp_path/'s')
    assert seen == [8, 8, 8, 8, None]

def test_evaluate(teacher, photos, capsys):
    "On the test images, which nothing was chosen on; the numbers are those of a loop by hand"
    card = photos.parent/'card.json'
    rkd('evaluate', teacher, '--attacks', 'clean,pgd20', '--json', card)
    found = json.loads(card.read_text())
    assert found['sample']['split'] == 'test' and found['n'] == 300 and 'all 300 test images' in capsys.readouterr().out
    net,_ = load_run(teacher)
    test = make_dls(str(photos), bs=50, size=8)[2]
    right = torch.cat([net(x.as_subclass(torch.Tensor)).argmax(1) == y for x,y in test]).float().mean().item()
    assert found['results']['clean']['accuracy'] == pytest.approx(right, abs=1e-6)
    assert 0 < found['results']['pgd20']['accuracy'] < right

STUDY = '''
data = "photos"
size = 8
width = "1/16"
eps = "25/255"
bs = 50
epochs = 2
teacher_epochs = 2
[measure]
attacks = ["clean", "pgd20"]
n = 100
[[grid]]
method = "at"
epochs = 4
[[grid]]
method = "akd"
alpha = [0.5, 1.0]
teacher_epoch = 1
'''

def test_study_and_report(photos, capsys, monkeypatch, tmp_path):
    "From another folder than that of the file, whose `data` is next to it"
    file,out = photos.parent/'mine.toml',tmp_path/'study'
    file.write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    rkd('study', file, '--out', out)
    rkd('study', 'report', out)
    assert 'Students and baselines' in capsys.readouterr().out or (out/'report').is_dir()
    cells = [json.loads(f.read_text()) for f in out.glob('cells/*/results.json')]
    assert len(cells) == 3
    for c in cells:
        assert c['last']['pgd20']['sample'] == dict(n=100, of=300, split='test', drawn='stratified by class', seed=0,
                                                    images=c['last']['pgd20']['sample']['images'])
    assert len({c['last']['pgd20']['sample']['images'] for c in cells}) == 1 # all are measured on the same images
    gain, = out.glob('report/gain.md')
    assert '100, stratified by class test images' in gain.read_text() or 'test images' in gain.read_text()
