"""Does a test fail for every operator that is wrong? Each operator of the losses, of PGD's steps and of the searches
is changed in turn, and the tests are run.

    python tools/mutate.py              # all groups, see below
    python tools/mutate.py losses       # one of them

Exits with 1 if a mutant survives that is not known to change nothing.
"""
import ast, os, shutil, signal, sys, tempfile
from pathlib import Path

root = Path(__file__).parent.parent

# group: (module, its functions and classes, the tests that have to notice)
groups = dict(
    losses=('losses.py',
            ['_ce','_kl','soft_targets','ensemble_probs','ckd_loss','ard_loss','rslad_loss','akd_loss','trades_loss',
             '_kl_between','_entropy','adaad_loss','iad_loss','igdm_loss','saad_loss'],
            ['tests/test_losses.py']),
    pgd=('attacks/pgd.py',
         ['_settle','_lengths','_Linf','_L2','PGD.loss','PGD.perturb','PGD._ascend','PGD._noise','PGD._score'],
         ['tests/attacks/test_attacks.py', '-k', 'not autoattack and not AutoAttack']),
    **{name: (f'attacks/{name}.py', None, ['tests/attacks/test_search.py'])
       for name in ('search','apgd','fab','square')},
)

# mutants that change nothing: (module, before, after), and why
harmless = {
    ('attacks/pgd.py', 'torch.sign(x_float - x_adv).to(torch.int16) * too_far',
     'torch.sign(x_float - x_adv).to(torch.int16) / too_far'): 'a quotient by zero is 0 as an int16',
    ('attacks/fab.py', 'gap >= 0', 'gap > 0'): 'a gap of 0 is no way to go, in either direction',
    ('attacks/fab.py', 'w > 0', 'w >= 0'): 'a component of weight 0 does not move',
    ('attacks/fab.py', 'room > by[:, None]', 'room >= by[:, None]'):
        'a component that has just arrived makes one step shorter, of thirty',
    **{('attacks/fab.py', *swap): 'how often it looks whether it is done' for swap in
       (('i % 4 == 3', 'i % 4 != 3'), ('i % 4', 'i * 4'), ('more <= 1e-06 * by', 'more < 1e-06 * by'))},
    ('attacks/square.py', '2 * eps * colour', '2 * eps / colour'): 'colours are 1 and -1',
    ('attacks/square.py', 'eps * uniform_noise((n, c, 1, w), rng, x.device).sign()',
     'eps / uniform_noise((n, c, 1, w), rng, x.device).sign()'): 'so are these',
}

swaps = {ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.Pow: [ast.Mult],
         ast.FloorDiv: [ast.Mult], ast.Mod: [ast.Mult],
         ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
         ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd],
         ast.And: [ast.Or], ast.Or: [ast.And]}

def defined(tree, names):
    "The functions and classes called `names` in `tree`, `Class.method` for methods; all of them where `names` is None"
    top = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    if names is None: return top
    found = {n.name: n for n in top} | {f'{c.name}.{m.name}': m for c in top if isinstance(c, ast.ClassDef)
                                        for m in c.body if isinstance(m, ast.FunctionDef)}
    return [found[n] for n in names]

def operators(node):
    "Every expression with an operator below `node`, but those in error messages and in annotations and defaults"
    if isinstance(node, (ast.Raise, ast.arguments, ast.JoinedStr)): return
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.Compare)): yield node
    if isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant): yield node
    for child in ast.iter_child_nodes(node): yield from operators(child)

def changes(node):
    "Each way to have another operator in `node`: a function that makes the change and returns one that takes it back"
    def put(attr, new):
        def change():
            old = getattr(node, attr)
            setattr(node, attr, new)
            return lambda: setattr(node, attr, old)
        return change
    if isinstance(node, ast.UnaryOp):
        return [put('op', ast.UAdd())] if isinstance(node.op, ast.USub) else [put('op', ast.USub())]
    if isinstance(node, ast.Compare):
        return [put('ops', [*node.ops[:i], new(), *node.ops[i+1:]]) for i,op in enumerate(node.ops)
                for new in swaps.get(type(op), [])]
    return [put('op', new()) for new in swaps.get(type(node.op), [])]

def mutants(source, names):
    "`(line, before, after, mutated source)` of each single change of an operator"
    tree = ast.parse(source)
    for top in defined(tree, names):
        for node in operators(top):
            before = ast.unparse(node)
            for change in changes(node):
                undo = change()
                yield node.lineno, before, ast.unparse(node), ast.unparse(tree)
                undo()

def survives(folder, tests, seconds=300):
    "Do the tests pass in `folder`? Each run is a fork of this process, which has imported what is slow to import"
    pid = os.fork()
    if not pid:
        signal.alarm(seconds) # a mutant may never end
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1); os.dup2(null, 2)
        os.chdir(folder); sys.path.insert(0, str(folder))
        import pytest
        os._exit(int(pytest.main(['-x', '-q', '-p', 'no:cacheprovider', '-p', 'no:randomly', '-W',
                                  'ignore::pytest.PytestAssertRewriteWarning', *tests])))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

def check(group):
    "Mutants of `group` that survive, as texts"
    module,names,tests = groups[group]
    with tempfile.TemporaryDirectory() as tmp:
        for part in ('rkd_fastai', 'tests'):
            shutil.copytree(root/part, Path(tmp)/part, ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(root/'pyproject.toml', tmp)
        path = Path(tmp)/'rkd_fastai'/module
        source,left,n = path.read_text(), [], 0
        if not survives(Path(tmp), tests): sys.exit(f'{group}: the tests fail as it is')
        for line,before,after,text in mutants(source, names):
            path.write_text(text)
            n += 1
            if survives(Path(tmp), tests) and (module, before, after) not in harmless:
                left.append(f'{module}:{line}: {before}  ->  {after}')
                print('survives:', left[-1], flush=True)
    print(f'{group}: {n} mutants, {n-len(left)} killed or known to change nothing', flush=True)
    return left

def main():
    os.environ['OMP_NUM_THREADS'] = '1'
    sys.dont_write_bytecode = True # a mutant of the same second would be taken for the one before
    # slow to import, and the same for all
    import fastai.vision.all, foolbox, sklearn.datasets, timm, torchattacks # noqa: F401
    left = [m for g in sys.argv[1:] or groups for m in check(g)]
    sys.exit(bool(left))

if __name__ == '__main__': main()
