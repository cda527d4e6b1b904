"Package metadata: read from settings.ini, the version from `rkd_fastai/__init__.py`, where nbdev keeps it."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(here/'settings.ini', encoding='utf8')
cfg = parser['DEFAULT']
version = re.search(r'__version__ = "(.+?)"', (here/'rkd_fastai/__init__.py').read_text(encoding='utf8')).group(1)
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable']

setup(
    name=cfg['lib_name'], version=version, description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], license_expression=cfg['license'],
    long_description=(here/'README.md').read_text(encoding='utf8'), long_description_content_type='text/markdown',
    classifiers=[f'Development Status :: {statuses[int(cfg["status"]) - 1]}',
                 'Intended Audience :: Science/Research', 'Intended Audience :: Developers',
                 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    packages=find_packages(include=['rkd_fastai', 'rkd_fastai.*']), package_data={'rkd_fastai': ['samples/*']},
    python_requires=f'>={cfg["min_python"]}', install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split(), 'docs': cfg['docs_requirements'].split()},
    entry_points={'console_scripts': ['rkd = rkd_fastai.cli.main:main'],
                  'nbdev': ['rkd_fastai = rkd_fastai._modidx:d']},
)
