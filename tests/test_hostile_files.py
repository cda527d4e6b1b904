"""Files made to harm: nothing in them is executed, none takes more memory than it is large, none reaches out of its
folder; a full disk leaves what was there."""
import builtins, errno, gzip, json, os, pickle, shutil, struct, zipfile
from pathlib import Path

import numpy as np, pytest, safetensors.torch, torch
from fastai.vision.all import Callback

from rkd_fastai.cli import main as cli
from rkd_fastai.all import *
from rkd_fastai.evaluation.robustness import measure_robustness
from rkd_fastai.study.run import load_run
from rkd_fastai.checkpoint import atomic_path, best_epoch, load_plain, read_card, read_state, write_atomic
from rkd_fastai.data.benchmarks import read_idx, read_pickle
from rkd_fastai.data.loaders import read_synthetic

class Calls:
    "Unpickled, it is what `f(*args)` returns"
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

def peak(f):
    "What `f` raised, and how many bytes the process grew by meanwhile"
    try:
        with open('/proc/self/clear_refs', 'w') as h: h.write('5') # the peak is now
    except OSError: pytest.skip('needs /proc')
    def most():
        return next(int(l.split()[1])*1024 for l in Path('/proc/self/status').read_text().splitlines()
                    if l.startswith('VmHWM'))
    was, error = most(), None
    try: f()
    except Exception as e: error = e
    return error, most() - was

def refused(f, *says, most=40e6, error=ValueError):
    "Raise unless `f` raises a `ValueError` of one line that says so, in little memory"
    e, grew = peak(f)
    assert isinstance(e, error), repr(e)
    assert all(str(s) in str(e) for s in says), str(e)
    assert '\n' not in str(e) and grew < most, f'{grew/1e6:.0f} MB'
    return str(e)

def rezipped(path, change=lambda name, data: data, method=zipfile.ZIP_STORED):
    "Write the archive `path` anew, its entries changed and packed"
    with zipfile.ZipFile(path) as z: entries = {i.filename: z.read(i) for i in z.infolist()}
    with zipfile.ZipFile(path, 'w', method, compresslevel=9) as z:
        for k,v in entries.items(): z.writestr(k, change(k, v))

# --- nothing is executed ---

def malicious(call):
    "Pickles that call `call`, by how"
    pickles = {f'protocol {p}': pickle.dumps(call, protocol=p) for p in (0, 1, 2, 3, 4, 5)}
    nested = pickle.dumps({b'data': [call], 'state_dict': {'w': call}}, protocol=2)
    return pickles | dict(nested=nested)

def carriers(tmp_path, data):
    "Files of every format that this library reads, with the pickle `data` in them: (path, who reads it)"
    def put(name, content):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_bytes(content)
        return tmp_path/name
    def in_zip(name):
        torch.save(dict(w=torch.zeros(3)), tmp_path/name)
        rezipped(tmp_path/name, lambda k, v: data if k.endswith('data.pkl') else v)
        return tmp_path/name
    def npz(name):
        with zipfile.ZipFile(tmp_path/name, 'w') as z:
            for k in ('image','label'):
                z.writestr(f'{k}.npy', b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, "
                                       b"'shape': (20, 8, 8), }".ljust(127) + b'\n' + data)
        return tmp_path/name
    run = lambda name, content: (
        put('run/card.json', json.dumps(dict(arch='resnet18', width=1/16, n_in=1, n_out=10)).encode()),
        put(f'run/{name}', content))[1].parent
    return [(in_zip('zip.pth'), read_state), (in_zip('zip.pt'), load_plain), (put('plain.pth', data), read_state),
            (put('plain.ckpt', data), read_state),
            (put('legacy.pth', pickle.dumps(0x1950a86a20f9469cfc6c, 2) + pickle.dumps(1001, 2)
                 + pickle.dumps(dict(protocol_version=1001, little_endian=True, type_sizes={}), 2) + data), read_state),
            (put('renamed.safetensors', data), read_state), (in_zip('zip.safetensors'), read_state),
            (put('renamed.npz', data), read_synthetic), (npz('objects.npz'), read_synthetic),
            (put('data_batch_1', data), read_pickle), (put('idx', data), read_idx),
            (put('idx.gz', gzip.compress(data)), read_idx),
            (put('card.json', data), read_card), (put('epochs/epoch_1.json', data).parent, best_epoch),
            (run('model.pth', data), load_run)]

def test_nothing_is_executed(tmp_path):
    "A marker that each of these would make is never made, and each is refused by name"
    marker, n = tmp_path/'marker', 0
    for call in (Calls(os.mkdir, str(marker)), Calls(builtins.exec, f'open({str(marker)!r}, "w")'),
                 Calls(open, str(marker), 'w'), Calls(os.system, f'touch {marker}'),
                 Calls(np.save, str(marker), 1), Calls(torch.save, 1, str(marker)), Calls(Path.touch, marker)):
        for data in malicious(call).values():
            for path,read in carriers(tmp_path, data):
                with pytest.raises(ValueError, match=path.name): read(path)
                n += 1
        assert not list(tmp_path.glob('marker*'))
    assert n == 7*7*15
    pickle.loads(pickle.dumps(Calls(os.mkdir, str(marker)))) # they are live
    assert marker.exists()

def test_resume_executes_nothing(tmp_path, make_learner):
    def fit(): torch.manual_seed(0); learn = make_learner(cbs=Resume(tmp_path/'run.pth')); learn.fit(1); return learn
    fit()
    for data in malicious(Calls(os.mkdir, str(tmp_path/'marker'))).values():
        rezipped(tmp_path/'run.pth', lambda k, v: data if k.endswith('data.pkl') else v)
        with pytest.raises(ValueError, match='run.pth'): fit()
    assert not (tmp_path/'marker').exists()

def test_state_files_execute_nothing(tmp_path, plain_net, test_images):
    x, y = (o[:4] for o in test_images)
    for data in malicious(Calls(os.mkdir, str(tmp_path/'marker'))).values():
        (tmp_path/'s').write_bytes(data)
        with pytest.raises(ValueError, match='`state_path`'):
            measure_robustness(plain_net, x, y, 'clean', state_path=tmp_path/'s')
    assert not (tmp_path/'marker').exists()

# --- no more memory than the file is large ---

huge = 300_000_000

def test_packed_checkpoint(tmp_path):
    "PyTorch itself would unpack it"
    torch.save(dict(w=torch.zeros(huge//4)), tmp_path/'a.pth')
    rezipped(tmp_path/'a.pth', method=zipfile.ZIP_DEFLATED)
    assert (tmp_path/'a.pth').stat().st_size < 1e6
    refused(lambda: read_state(tmp_path/'a.pth'), 'a.pth', 'more memory than its file size')
    assert torch.load(tmp_path/'a.pth', weights_only=True)['w'].nbytes == huge # it is live

def test_checkpoint_of_entries_inside_each_other(tmp_path):
    "A hundred tensors that are one place in the file"
    path = tmp_path/'a.pth'
    torch.save({f'w{i}': torch.full((250_000,), float(i)) for i in range(100)}, path)
    with zipfile.ZipFile(path) as z:
        first = next(i for i in z.infolist() if i.filename.endswith('data/0'))
        names = [i for i in z.infolist()]
        small = {i.filename: z.read(i) for i in names if '/data/' not in i.filename}
        one = z.read(first)
    with zipfile.ZipFile(path, 'w') as z:
        for k,v in small.items(): z.writestr(k, v)
        z.writestr(first.filename, one)
        at = z.getinfo(first.filename)
        for i in names:
            if '/data/' in i.filename and i.filename != first.filename:
                o = zipfile.ZipInfo(i.filename)
                o.file_size, o.compress_size, o.CRC, o.header_offset = (
                    at.file_size, at.compress_size, at.CRC, at.header_offset)
                z.filelist.append(o); z.NameToInfo[o.filename] = o
        z._didModify = True
    assert path.stat().st_size < 2e6
    refused(lambda: read_state(path), 'a.pth', 'compressed or overlap')

def test_numbers_repeated_without_end(tmp_path, tiny_net):
    """A shape that no file could hold, of a tensor whose every element is the same one; tied and transposed weights
    are none"""
    for t in (torch.zeros(1).expand(10**9), torch.zeros(1, 3).expand(10**5, 3), torch.empty(10**6, device='meta')):
        torch.save(dict(w=t), tmp_path/'a.pth')
        refused(lambda: read_state(tmp_path/'a.pth'), 'a.pth', '`w`', tuple(t.shape),
                '' if t.is_meta else 'save `model.state_dict()` again')
    w = torch.rand(30, 40)
    torch.save(dict(w=w.T, tied=w.T, part=w[3:5], one=torch.zeros(1).expand(3)), tmp_path/'a.pth')
    assert torch.equal(read_state(tmp_path/'a.pth')['w'], w.T)

@pytest.mark.parametrize('legacy', [True, False])
def test_absurd_shapes_in_checkpoints(legacy, tmp_path):
    torch.save(dict(w=torch.zeros(7)), tmp_path/'a.pth', _use_new_zipfile_serialization=not legacy)
    for n in (10**8, 10**9, 10**13):
        long = b'\x8a\x06' + n.to_bytes(6, 'little')
        path = shutil.copy(tmp_path/'a.pth', tmp_path/'b.pth')
        if legacy: path.write_bytes(path.read_bytes().replace(b'K\x07', long))
        else: rezipped(path, lambda k, v: v.replace(b'K\x07', long))
        refused(lambda: read_state(path), 'b.pth')

@pytest.mark.parametrize('how', ['zip','legacy','plain'])
def test_a_bytearray_of_any_size(how, tmp_path):
    "PyTorch's safe reader lets a file call it"
    path, data = tmp_path/'a.pth', Calls(bytearray, huge)
    if how == 'plain': path.write_bytes(pickle.dumps(data, 2))
    else: torch.save(dict(w=data), path, _use_new_zipfile_serialization=how == 'zip')
    refused(lambda: read_state(path), 'a.pth', 'bytearray')

def test_safetensors_headers(tmp_path):
    good = safetensors.torch.save(dict(w=torch.zeros(7)))
    head = json.dumps(dict(w=dict(dtype='F32', shape=[10**9], data_offsets=[0, 4*10**9]))).encode()
    for data in (struct.pack('<Q', 2**62) + good[8:], struct.pack('<Q', len(head)) + head + bytes(28), good[:-1],
                 good + bytes(9), b'', struct.pack('<Q', 10**5) + b'['*10**5,
                 struct.pack('<Q', len(head)) + head.replace(b'4000000000', b'28') + bytes(28),
                 good.replace(b'[0,28]', b'[8,28]')):
        (tmp_path/'a.safetensors').write_bytes(data)
        refused(lambda: read_state(tmp_path/'a.safetensors'), 'a.safetensors')

def idx(dims, data=b''): return bytes([0, 0, 8, len(dims)]) + struct.pack(f'>{len(dims)}I', *dims) + data

@pytest.mark.few(2)
@pytest.mark.parametrize('dims', [(10, 28, 28), (2**32-1, 28, 28), (10, 2**31, 2**31), (0, 28, 28), (2**32-1,), (10,)])
def test_packed_idx(dims, tmp_path):
    "300 MB of zeros in 300 KB; only a header that says so may have them"
    with gzip.open(tmp_path/'a.gz', 'wb') as f:
        f.write(idx(dims))
        for _ in range(30): f.write(bytes(huge//30))
    refused(lambda: read_idx(tmp_path/'a.gz', (28, 28) if len(dims) == 3 else ()), 'a.gz',
            most=350e6 if dims[0] == 2**32-1 else 40e6)

def test_absurd_idx_headers(tmp_path):
    for n in (10, 10**6, 2**32-1):
        (tmp_path/'a').write_bytes(idx((n, 28, 28), bytes(784)))
        refused(lambda: read_idx(tmp_path/'a', (28, 28)), f'does not contain {n} elements')
    for cut in range(16):
        (tmp_path/'a').write_bytes(idx((1, 28, 28), bytes(784))[:cut])
        refused(lambda: read_idx(tmp_path/'a', (28, 28)), 'a')

def test_idx_that_is_right(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (5, 4, 6), dtype=np.uint8)
    for name,pack in (('a', bytes), ('a.gz', gzip.compress)):
        (tmp_path/name).write_bytes(pack(idx(x.shape, x.tobytes())))
        assert np.array_equal(read_idx(tmp_path/name, (4, 6)), x)
    (tmp_path/'z.gz').write_bytes(gzip.compress(idx((1000, 28, 28), bytes(784_000)))) # all black
    assert read_idx(tmp_path/'z.gz', (28, 28)).shape == (1000, 28, 28)

reconstruct = np.empty(0).__reduce__()[0]
class Sets:
    "`f(*args)`, on which `state` is then set"
    def __init__(self, f, args, state): self.f, self.args, self.state = f, args, state
    def __reduce__(self): return self.f, self.args, self.state
bombs = dict(
    memo=b'\x80\x02]r' + struct.pack('<I', 2**25) + b'.', bytearray8=b'\x80\x05\x96' + struct.pack('<Q', huge) + b'.',
    binbytes8=b'\x80\x04\x8e' + struct.pack('<Q', huge) + b'x.',
    long4=b'\x80\x02\x8b' + struct.pack('<i', huge) + b'x.', frame=b'\x80\x04\x95' + struct.pack('<Q', huge) + b'].',
    objects=pickle.dumps(Calls(np.ndarray, (huge//8,), 'O'), 2),
    array=pickle.dumps(Calls(np.ndarray, (10**11,), 'u1'), 2),
    call=pickle.dumps(Calls(reconstruct, np.ndarray, (huge//8,), 'O'), 2),
    object_dtype=pickle.dumps({b'data': np.array([None]*3)}, 2),
    subarray=pickle.dumps(Calls(np.dtype, [('a', 'u1', (10**8,))]), 2), text_dtype=pickle.dumps(np.array(['a'*100]), 2),
    state=pickle.dumps({b'data': Sets(reconstruct, (np.ndarray, (0,), b'b'),
                                      (1, (huge,), np.dtype('u1'), False, b'abc'))}, 2),
    object_state=pickle.dumps({b'data': Sets(reconstruct, (np.ndarray, (0,), b'b'),
                                             (1, (huge//8,), np.dtype('O'), False, [1]))}, 2),
    dtype_state=pickle.dumps({b'data': Sets(np.dtype, ('u1', False, True),
                                            (3, '|', (np.dtype('u1'), (huge,)), None, None, huge, 1, 0))}, 2))

@pytest.mark.parametrize('name', bombs)
def test_cifar_bombs(name, tmp_path):
    "A pickle may ask for memory in its opcodes, or through NumPy"
    (tmp_path/'train').write_bytes(bombs[name])
    e, grew = peak(lambda: cifar100_dls(tmp_path))
    assert isinstance(e, ValueError) and str(tmp_path/'train') in str(e) and grew < 40e6, (e, grew)

def test_builtin_dtypes_stay(tmp_path):
    "What a pickle sets on a dtype must not change that of others"
    before = np.dtype('u1').__reduce__()
    for state in ((3, '>', None, None, None, -1, -1, 0), (3, '|', None, ('a',), {'a': (np.dtype('u1'), 0)}, 1, 1, 0)):
        (tmp_path/'a').write_bytes(pickle.dumps(Sets(np.dtype, ('u1', False, False), state), 2))
        try: read_pickle(tmp_path/'a')
        except ValueError: pass
        assert np.dtype('u1').__reduce__() == before and np.zeros(3, 'u1').tolist() == [0, 0, 0]

@pytest.mark.parametrize('protocol', range(5))
def test_arrays_of_every_number(protocol, tmp_path):
    for t in ('u1','i8','>i4','f4','f8','b1','f2'):
        a = (np.arange(24).reshape(2, 3, 4)%2).astype(t)
        for o in (a, np.asfortranarray(a), a[:, ::2], *([a[:0]] if protocol > 2 else [])):
            (tmp_path/'a').write_bytes(pickle.dumps({'x': [o, o], b'names': [b'a\xff', 'é'],
                                                     'n': (1, 2.5, None, True, 10**30)}, protocol))
            got = read_pickle(tmp_path/'a')
            assert (got[b'names'] == [b'a\xff', 'é'] and got['x'][0].dtype == o.dtype.newbyteorder('=')
                    and np.array_equal(got['x'][0], o) and got['n'] == (1, 2.5, None, True, 10**30))

@pytest.mark.parametrize('changes', [
    dict(width=16), dict(width=1000.), dict(n_out=10**8), dict(n_in=10**6), dict(arch='wrn-28-100'),
    dict(arch='wrn-4000-1'), dict(arch='wrn-100000-100000'), dict(arch='wrn-994-1'), dict(n_out=10**30),
    dict(n_out=-1), dict(n_out=True), dict(n_out=None), dict(n_out=[10]), dict(width='x'), dict(width=1e308),
    dict(arch=['resnet18']), dict(arch=None), dict(arch={}), dict(arch='resnet18.foo'), dict(arch='hf-hub:a/b'),
    dict(arch='local-dir:/etc'), dict(arch='../../resnet18'), dict(arch='resnet18\0'), dict(arch='test_resnet'),
    dict(arch='wrn-10-1')], ids=str)
def test_cards_that_describe_another_network(changes, tmp_path):
    "Refused before the network is made, however large it would be"
    torch.save(cifar_resnet18(10, 1/16, 1).state_dict(), tmp_path/'model.pth')
    card = dict(arch='resnet18', width=1/16, n_in=1, n_out=10)
    (tmp_path/'card.json').write_text(json.dumps(card)); load_run(tmp_path)
    (tmp_path/'card.json').write_text(json.dumps(card | changes))
    refused(lambda: load_run(tmp_path), tmp_path)

bad_json = ['['*10**5, '{"a":'*10**5, '1'*5000, '"x"', '[]', 'null', '3', '', '{', '\0',
            '{"vocab": ' + ' '*2**21 + '3}', 'NaN']
@pytest.mark.parametrize('text', bad_json, ids=lambda t: t[:9].replace('\0', '0'))
def test_json_that_is_none(text, tmp_path, plain_net, test_images):
    for name in ('card.json','epoch_1.json','s'): (tmp_path/name).write_text(text)
    torch.save(cifar_resnet18(10, 1/16, 1).state_dict(), tmp_path/'model.pth')
    x, y = (o[:4] for o in test_images)
    for f in (lambda: read_card(tmp_path/'card.json'), lambda: load_run(tmp_path), lambda: best_epoch(tmp_path),
              lambda: measure_robustness(plain_net, x, y, 'clean', state_path=tmp_path/'s')):
        with pytest.raises(ValueError) as e: f()
        assert str(tmp_path) in str(e.value)

@pytest.mark.parametrize('text', [*bad_json, None], ids=lambda t: str(t)[:9].replace('\0', '0'))
def test_a_damaged_card_is_named(text, tmp_path):
    "With a way out, also where an interrupted run goes on"
    card = tmp_path/'card.json'
    if text is not None: card.write_text(text)
    (tmp_path/'resume.pth').touch()
    torch.save(cifar_resnet18(10, 1/16, 1).state_dict(), tmp_path/'epoch_1.pth')
    commands = [('train', '--data', 'digits', '--width', '1/16', '--out', str(tmp_path), '--resume')]
    for command in commands + [('evaluate', str(tmp_path/'epoch_1.pth'))]*(text is not None):
        with pytest.raises(SystemExit) as e: cli.main([*command])
        assert e.value.code.startswith(f'rkd: error: `{card}`') and 'restore it from a copy' in e.value.code
        assert (text is None) == ('does not exist' in e.value.code)

@pytest.mark.parametrize('vocab', [3, 'abc', {'a': 1}, [1, 2], [['a']], [None]])
def test_vocab_that_is_none(vocab, tmp_path, tiny_net):
    torch.save(tiny_net().state_dict(), tmp_path/'epoch_1.pth')
    (tmp_path/'epoch_1.json').write_text(json.dumps(dict(robust_accuracy=.5, vocab=vocab)))
    with pytest.raises(ValueError, match='epoch_1.json.*vocab'): Teacher.at_epoch(tmp_path, 'best', tiny_net())

@pytest.mark.parametrize('mean', [3, 'abc', {'a': 1}, [None], ['1'], [[.5]], [float('nan')], [.5]*5 + [True]], ids=str)
def test_normalisation_that_is_none(mean, tmp_path, tiny_net):
    torch.save(tiny_net().state_dict(), tmp_path/'epoch_1.pth')
    (tmp_path/'epoch_1.json').write_text(json.dumps(dict(robust_accuracy=.5, vocab=[], mean=mean, std=[.5])))
    for f in (lambda: Teacher.at_epoch(tmp_path, 'best', tiny_net()),
              lambda: load_teacher(tmp_path/'epoch_1.pth', tiny_net())):
        with pytest.raises(ValueError, match='mean'): f()

@pytest.mark.parametrize('changes', [
    dict(part=-1), dict(part='0'), dict(part=.5), dict(next=-3), dict(next=10**9), dict(bs=0), dict(bs=-1),
    dict(bs=None), dict(seconds=-1.), dict(seconds='1'), dict(seconds=float('nan')), dict(is_robust='9999'),
    dict(is_robust='111'), dict(is_robust='11x1'), dict(is_robust=['1']*4 + ['']), dict(more=1), dict(part=True)],
    ids=str)
def test_state_files_that_lie(changes, tmp_path, plain_net, test_images):
    x, y = (o[:4] for o in test_images)
    run = lambda: measure_robustness(plain_net, x, y, ['clean','pgd2'], .1, state_path=tmp_path/'s', bs=2)
    run()
    state = json.loads((tmp_path/'s').read_text())
    state['attacks']['pgd2'] |= changes
    (tmp_path/'s').write_text(json.dumps(state))
    with pytest.raises(ValueError, match='`state_path`'): run()
    assert json.loads((tmp_path/'s').read_text())['attacks'].keys() == {'clean','pgd2'}

# --- nothing reaches out of its folder ---

def changed(path, **what):
    "Change what is in a file of `Resume`, keeping its form"
    s = torch.load(path, weights_only=False)
    for k,f in what.items(): s[k] = f(s[k]) if callable(f) else f
    torch.save(s, path)

def training(make_learner, path, dies=True):
    class Die(Callback):
        order, only_shows = 2000, True
        def __init__(self, dies): self.dies = dies
        def after_epoch(self): assert not self.dies or self.epoch < 1
    torch.manual_seed(0)
    learn = make_learner(cbs=[KeepEpochs(), WeightAveraging(.9), Resume(path), Die(dies)])
    if not dies: return learn.fit(4) or learn
    with pytest.raises(AssertionError): learn.fit(4)

@pytest.mark.parametrize('changes', [
    dict(keep_epochs=dict(model_dir='../outside')), dict(keep_epochs=dict(path='..')),
    dict(keep_epochs=dict(fname='../x')), dict(keep_epochs=dict(every=1)), dict(keep_epochs=dict(card={})),
    dict(keep_epochs=dict(each_epoch=3)), dict(keep_epochs=dict(learn=3)), dict(keep_epochs=dict(run=False)),
    dict(keep_epochs={'a b': 1}), dict(keep_epochs=dict(__class__=3)), dict(keep_epochs=dict(dls=3)),
    dict(weight_averaging=dict(decay=2.)), dict(weight_averaging=dict(model=3)), dict(keep_epochs=dict(opt=3))],
    ids=str)
def test_a_run_that_sets_what_it_did_not_keep(changes, make_learner, tmp_path):
    "The memory of a callback is its memory, neither its settings nor the Learner's folders"
    path = tmp_path/'run'/'run.pth'
    training(make_learner, path)
    changed(path, memory=lambda m: {k: v | changes.get(k, {}) for k,v in m.items()})
    before = sorted(p for p in tmp_path.rglob('*'))
    with pytest.raises(ValueError, match='is not a value that `Resume` saves'): training(make_learner, path, False)
    assert sorted(p for p in tmp_path.rglob('*')) == before

@pytest.mark.parametrize('changes', [
    dict(epoch=-1), dict(epoch=-10**9), dict(epoch=5), dict(done=-1), dict(done=3), dict(done=10**9)], ids=str)
def test_a_run_of_absurd_numbers(changes, make_learner, tmp_path):
    path = tmp_path/'run.pth'
    training(make_learner, path)
    changed(path, **changes)
    with pytest.raises(ValueError, match='run.pth` is damaged'): training(make_learner, path, False)

@pytest.mark.parametrize('k', 'training epoch done model opt memory random'.split())
def test_a_run_without_a_part(k, make_learner, tmp_path):
    path = tmp_path/'run.pth'
    training(make_learner, path)
    s = torch.load(path, weights_only=False); del s[k]; torch.save(s, path)
    with pytest.raises(ValueError, match='run.pth` is damaged'): training(make_learner, path, False)

def test_a_run_as_it_is(make_learner, tmp_path):
    "That the ones above are refused for what was changed: rewritten unchanged, it goes on"
    training(make_learner, tmp_path/'run.pth')
    changed(tmp_path/'run.pth')
    training(make_learner, tmp_path/'run.pth', False)

def test_paths_in_cards_lead_nowhere(tmp_path, monkeypatch):
    "Whatever else a card says, the checkpoint is the file beside it, and nothing is written"
    folder, outside = tmp_path/'run', tmp_path/'outside'
    folder.mkdir(); outside.mkdir()
    torch.save(cifar_resnet18(10, 1/16, 1).state_dict(), folder/'model.pth')
    torch.save(cifar_resnet18(7, 1/16, 1).state_dict(), outside/'model.pth')
    card = dict(arch='resnet18', width=1/16, n_in=1, n_out=10)
    for k in ('path','model','out','weights','checkpoint','file','state','json'):
        for where in ('../outside/model.pth', str(outside/'model.pth'), '../outside'): card[k] = where
    (folder/'card.json').write_text(json.dumps(card))
    (folder/'epoch_1.json').write_text(json.dumps(card | dict(robust_accuracy=1.)))
    shutil.copy(folder/'model.pth', folder/'epoch_1.pth')
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    assert load_run(folder)[0].probs(torch.rand(1, 1, 8, 8)).shape == (1, 10)
    assert best_epoch(folder) == 1 and Teacher.at_epoch(
        folder, 'best', cifar_resnet18(10, 1/16, 1)).probs(torch.rand(1, 1, 8, 8)).shape == (1, 10)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == before

def test_epochs_are_looked_for_in_their_folder_only(tmp_path, tiny_net):
    (tmp_path/'a').mkdir(); (tmp_path/'b').mkdir()
    torch.save(tiny_net().state_dict(), tmp_path/'b'/'epoch_1.pth')
    with pytest.raises(FileNotFoundError): Teacher.at_epoch(tmp_path/'a', 1, tiny_net(), fname='../b/epoch')
    with pytest.raises(FileNotFoundError): best_epoch(tmp_path/'a', fname='../b/epoch')

@pytest.mark.parametrize('changes', [dict(data=None), dict(data=3), dict(data=['x']), dict(data_path=3),
                                     dict(size='64'), dict(data='no/such/folder'), dict(data='../../no')], ids=str)
def test_evaluate_without_data(changes, tmp_path, monkeypatch):
    torch.save(cifar_resnet18(10, 1/16, 1).state_dict(), tmp_path/'model.pth')
    (tmp_path/'card.json').write_text(json.dumps(dict(arch='resnet18', width=1/16, n_in=1, n_out=10) | changes))
    with pytest.raises(SystemExit, match='^rkd: error: .*--data'): cli.main(['evaluate', str(tmp_path)])

def test_names_in_tiny_imagenet_stay_in_their_folder(tmp_path):
    from PIL import Image
    for f in ('train/n01/images/a.JPEG', 'train/n01/images/b.JPEG', 'train/n02/images/a.JPEG',
              'train/n02/images/b.JPEG', 'val/images/v.JPEG', 'secret.JPEG'):
        (tmp_path/f).parent.mkdir(parents=True, exist_ok=True); Image.new('RGB', (64, 64)).save(tmp_path/f)
    def read(name):
        (tmp_path/'val/val_annotations.txt').write_text(f'{name}\tn01\t0\t0\t1\t1\n')
        return tiny_imagenet_dls(tmp_path, bs=1, valid_pct=.5)
    read('v.JPEG')
    for name in ('../../secret.JPEG', str(tmp_path/'secret.JPEG'), 'x/../../../secret.JPEG', '..', '.'):
        with pytest.raises(ValueError, match='val_annotations.txt'): read(name)

def test_symlinks_and_devices(tmp_path, tiny_net):
    "A link to weights is one to weights; what never ends is no file"
    torch.save(tiny_net().state_dict(), tmp_path/'real.pth')
    (tmp_path/'link.pth').symlink_to(tmp_path/'real.pth')
    assert read_state(tmp_path/'link.pth').keys() == tiny_net().state_dict().keys()
    (tmp_path/'zero.pth').symlink_to('/dev/zero')
    (tmp_path/'gone.pth').symlink_to(tmp_path/'none')
    (tmp_path/'loop.pth').symlink_to(tmp_path/'loop.pth')
    os.mkfifo(tmp_path/'pipe.pth')
    for name in ('zero','gone','loop','pipe'):
        with pytest.raises((FileNotFoundError, ValueError), match=name):
            load_teacher(tmp_path/f'{name}.pth', tiny_net())

def test_writing_replaces_a_link_and_not_what_it_points_to(tmp_path):
    (tmp_path/'target').write_text('mine')
    (tmp_path/'card.json').symlink_to(tmp_path/'target')
    write_atomic(tmp_path/'card.json', 'new')
    assert ((tmp_path/'target').read_text() == 'mine' and (tmp_path/'card.json').read_text() == 'new'
            and not (tmp_path/'card.json').is_symlink())

# --- cut off anywhere ---

def test_cut_off_anywhere(tmp_path, tiny_net):
    "Each format at fifty places: one line that names the file"
    torch.save(tiny_net().state_dict(), tmp_path/'a.pth')
    torch.save(tiny_net().state_dict(), tmp_path/'l.pth', _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(tiny_net().state_dict(), tmp_path/'a.safetensors')
    np.savez(tmp_path/'a.npz', image=np.zeros((20, 8, 8), np.uint8), label=np.arange(20))
    (tmp_path/'a.gz').write_bytes(gzip.compress(idx((20, 8, 8), np.random.default_rng(0).bytes(1280))))
    (tmp_path/'idx').write_bytes(idx((20, 8, 8), bytes(1280)))
    (tmp_path/'data_batch_1').write_bytes(pickle.dumps({b'data': np.zeros((20, 3072), np.uint8),
                                                        b'labels': list(range(20))}, 2))
    (tmp_path/'card.json').write_text(json.dumps(dict(robust_accuracy=.5, vocab=[str(i) for i in range(10)])))
    readers = dict(pth=read_state, safetensors=read_state, npz=read_synthetic, gz=lambda p: read_idx(p, (8, 8)),
                   json=read_card)
    for path in sorted(tmp_path.iterdir()):
        read = readers.get(path.suffix[1:], read_pickle if path.name == 'data_batch_1'
                           else lambda p: read_idx(p, (8, 8)))
        data = path.read_bytes()
        read(path)
        for n in sorted({0, 1, len(data)-1, *np.random.default_rng(0).integers(0, len(data), 50).tolist()}):
            path.write_bytes(data[:n])
            with pytest.raises(ValueError) as e: read(path)
            assert path.name in str(e.value) and str(e.value).count('\n') == 0, (path, n)

# --- full disks and read-only folders ---

full = [OSError(errno.ENOSPC, 'No space left on device'),
        RuntimeError('[enforce fail at inline_container.cc:603] . '
                     'PytorchStreamWriter failed writing file data/1: file write failed'),
        PermissionError(errno.EACCES, 'Permission denied'), OSError(errno.EROFS, 'Read-only file system'),
        OSError(errno.EDQUOT, 'Disk quota exceeded')]
each_full = pytest.mark.parametrize('error', full, ids=lambda e: str(e)[:12])

def simulate_disk_full(mp, error, after=0):
    "From the `after`-th write on, half of it and then `error`"
    left = [after]
    def guard(f):
        def g(*args, **kwargs):
            left[0] -= 1
            if left[0] >= 0: return f(*args, **kwargs)
            path = next(a for a in args if isinstance(a, Path))
            path.write_bytes(b'half') if f is not write else f(path, 'half')
            raise error
        return g
    write = Path.write_text
    mp.setattr(torch, 'save', guard(torch.save)); mp.setattr(Path, 'write_text', guard(write))

@each_full
def test_keeping_epochs_on_a_full_disk(error, make_learner, tiny_net, monkeypatch):
    "One line that names the file; the epochs before, and their cards, are whole"
    learn = make_learner(cbs=KeepEpochs())
    learn.fit(3)
    folder = learn.path/learn.model_dir
    was = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert len(was) == 6
    with monkeypatch.context() as mp:
        simulate_disk_full(mp, error, after=2)
        with pytest.raises(OSError) as e: learn.fit(3)
    says = str(e.value).splitlines()[-1]
    assert 'epoch_5.pth` cannot be written' in says and str(error) in says and 'is unchanged' in says
    now = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert now.keys() == {*was, 'epoch_4.pth', 'epoch_4.json'} and all(now[k] == was[k] for k in was)
    for n in (1, 2, 3, 4): Teacher.at_epoch(folder, n, tiny_net())
    assert best_epoch(folder, by='valid_loss') in (1, 2, 3, 4)
    learn.fit(1)

@each_full
def test_a_card_on_a_full_disk(error, make_learner, tiny_net, monkeypatch):
    "It is missing, and the training can go on"
    learn = make_learner(cbs=KeepEpochs())
    folder = learn.path/learn.model_dir
    with monkeypatch.context() as mp:
        simulate_disk_full(mp, error, after=1)
        with pytest.raises(OSError, match='epoch_1.json` cannot be written'): learn.fit(1)
    assert [p.name for p in folder.iterdir()] == ['epoch_1.pth']
    Teacher.at_epoch(folder, 1, tiny_net())
    learn.fit(1)
    assert sorted(p.name for p in folder.iterdir()) == ['epoch_1.pth', 'epoch_2.json', 'epoch_2.pth']

@each_full
def test_state_files_on_a_full_disk(error, tmp_path, plain_net, test_images, monkeypatch):
    x, y = (o[:6] for o in test_images)
    run = lambda: measure_robustness(plain_net, x, y, ['clean','pgd2'], .1, state_path=tmp_path/'s', bs=2)
    with monkeypatch.context() as mp:
        simulate_disk_full(mp, error, after=3)
        with pytest.raises(OSError) as e: run()
    assert ('`state_path`' in str(e.value) and str(tmp_path/'s') in str(e.value) and str(error) in str(e.value)
            and '\n' not in str(e.value))
    assert [p.name for p in tmp_path.iterdir()] == ['s'] and 'run' in json.loads((tmp_path/'s').read_text())
    got = run(); (tmp_path/'s').unlink()
    assert got.results == run().results

@each_full
def test_rkd_on_a_full_disk(error, tmp_path, monkeypatch):
    "One line, whatever PyTorch calls it, and no half file"
    args = ['train', '--data', 'digits', '--n', '64', '--bs', '32', '--width', '1/16', '--epochs', '1', '--out',
            str(tmp_path/'run'), '--steps', '1']
    with monkeypatch.context() as mp:
        simulate_disk_full(mp, error, after=1)
        with pytest.raises(SystemExit, match='cannot be written') as e: cli.main(args)
    assert str(e.value).startswith('rkd: error: ') and str(error) in str(e.value) and '\n' not in str(e.value)
    assert not list((tmp_path/'run').glob('.*')) and not (tmp_path/'run'/'model.pth').exists()

@pytest.mark.skipif(not hasattr(os, 'geteuid') or not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_disk_that_is_really_full(tmp_path):
    "What the system itself says"
    with pytest.raises(OSError, match='cannot be written.*No space left'):
        with atomic_path(tmp_path/'a') as tmp:
            tmp.symlink_to('/dev/full'); tmp.write_text('x'*10**5)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match='cannot be written'):
        with atomic_path(tmp_path/'a') as tmp:
            tmp.symlink_to('/dev/full'); torch.save(torch.zeros(10**5), tmp)
    assert list(tmp_path.iterdir()) == []

def test_other_errors_stay_what_they_are(tmp_path):
    "Only what writing raises is called that"
    (tmp_path/'a').write_text('before')
    for error in (KeyboardInterrupt, KeyError, ValueError):
        with pytest.raises(error):
            with atomic_path(tmp_path/'a') as tmp: tmp.write_text('half'); raise error('x')
    assert (tmp_path/'a').read_text() == 'before' and [p.name for p in tmp_path.iterdir()] == ['a']
