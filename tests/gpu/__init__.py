"What is measured and checked on a GPU: `check.py`."
