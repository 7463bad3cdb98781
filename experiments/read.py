"""Build the pages that show equation and code side by side: python experiments/read.py [out=FOLDER] [open=true]"""

from ddpm.cli import read

if __name__ == "__main__":
    read()
