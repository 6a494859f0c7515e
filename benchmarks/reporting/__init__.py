"""A recorded run as tables (report.py), plots (plots.py) and the figures in docs/ (page.py)."""
