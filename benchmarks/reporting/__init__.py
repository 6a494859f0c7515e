"""A recorded run as tables (report.py), plots (plots.py) and figures in docs/ (page.py)."""
