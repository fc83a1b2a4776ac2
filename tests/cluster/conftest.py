"""The files here are programs for the launcher; tests/test_programs.py runs them."""
collect_ignore_glob = ["*.py"]
