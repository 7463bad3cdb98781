"""Edit an image: python experiments/edit.py run=DIR image=FILE strength=0.6 [out=FILE] [key=value ...]"""

from ddpm.cli import edit

if __name__ == "__main__":
    edit()
