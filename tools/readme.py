"Write README.md from nbs/index.ipynb: prose as it is, code fenced, hidden cells and nbdev's directives left out."
import json, posixpath, re
from pathlib import Path

root = Path(__file__).parent.parent

def cell_md(cell):
    "One cell as Markdown, or None"
    src = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
        # from nbs/ to the root
        return re.sub(r'\]\((?!https?:|#)([^)\s]+)\)', lambda m: f"]({posixpath.normpath(f'nbs/{m[1]}')})", src)
    if re.match(r'#\|\s*(hide|default_exp)', src): return None
    src = re.sub(r'^#\|.*\n', '', src, flags=re.M)
    return f'```python\n{src}\n```'

def readme():
    "The text of README.md"
    cells = json.loads((root/'nbs/index.ipynb').read_text(encoding='utf8'))['cells']
    note = '<!-- Made from nbs/index.ipynb by `make export`: edit it there. -->'
    return '\n\n'.join([note] + [md for c in cells if (md := cell_md(c))]) + '\n'

if __name__ == '__main__': (root/'README.md').write_text(readme(), encoding='utf8')
