"""Measure the samples of a run directory: python experiments/evaluate.py run=DIR [metric=NAME] [key=value ...]"""

from ddpm.cli import evaluate

if __name__ == "__main__":
    evaluate()
