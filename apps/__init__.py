"""The applications. A wheel has this folder in lapse/_bundled: see lapse/programs.py."""
