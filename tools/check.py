"Fail if notebooks, modules or README.md are out of step, or a notebook carries noise."
import shutil, subprocess, sys, tempfile
from pathlib import Path
from readme import readme, root

def changed_by(command, *folders):
    "Files in `folders` that `command`, run on a copy of the repository, changes, makes or deletes"
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/root.name
        shutil.copytree(root, copy, ignore=shutil.ignore_patterns('.venv', '.git', 'demo', 'runs', '__pycache__'))
        subprocess.run([Path(sys.executable).parent/command], cwd=copy, check=True, capture_output=True)
        files = {p.relative_to(base) for base in (root, copy) for f in folders for p in (base/f).rglob('*')
                 if p.is_file() and p.suffix in ('.py', '.ipynb') and '.ipynb_checkpoints' not in p.parts}
        return sorted(str(f) for f in files if read(root/f) != read(copy/f))

def read(path): return path.read_bytes() if path.exists() else None

problems = [f'{f} is not what its notebook exports: run `make export`'
            for f in changed_by('nbdev-export', 'rkd_fastai')]
problems += [f'{f} is not clean: run `make export`' for f in changed_by('nbdev-clean', 'nbs')]
if (root/'README.md').read_text(encoding='utf8') != readme():
    problems.append('README.md differs from nbs/index.ipynb: run `make export`')
print('\n'.join(problems) or 'notebooks, modules and README are in step')
sys.exit(bool(problems))
