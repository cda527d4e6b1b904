"`python -m rkd_fastai.cli` does what `rkd` does."
from .main import main

if __name__ == '__main__': main()
