"""A recorded run as tables (report.py), plots (plots.py) and the README's figures (readme.py)."""
