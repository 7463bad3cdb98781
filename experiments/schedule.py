"""Draw noise schedules side by side: python experiments/schedule.py [schedule=NAME] [compare=[NAME]] [key=value ...]"""

from ddpm.cli import schedule

if __name__ == "__main__":
    schedule()
