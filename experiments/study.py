"""What a sweep will be, how far it is and what it means: python experiments/study.py VERB WORDS, or --help"""

from ddpm.cli import study

if __name__ == "__main__":
    study()
