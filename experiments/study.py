"""Plan a sweep, follow it, report and search: python experiments/study.py VERB WORDS, or --help"""

from ddpm.cli import study

if __name__ == "__main__":
    study()
