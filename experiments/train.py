"""Train a network and draw what it learned: python experiments/train.py [experiment=NAME] [key=value ...]"""

from ddpm.cli import train

if __name__ == "__main__":
    train()
