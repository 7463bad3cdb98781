"""What a sweep means: its arms, their differences and how sure they are, in one page."""
