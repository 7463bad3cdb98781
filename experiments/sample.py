"""Draw samples from a run directory: python experiments/sample.py run=DIR [n=64] [out=FILE] [key=value ...]"""

from ddpm.cli import sample

if __name__ == "__main__":
    sample()
