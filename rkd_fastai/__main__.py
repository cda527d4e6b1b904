"`python -m rkd_fastai` does what `rkd` does."
from .cli.main import main

if __name__ == '__main__': main()
