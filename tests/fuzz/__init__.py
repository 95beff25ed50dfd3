"""Random damage done to what the tools read, by kind: `python -m tests.fuzz --minutes 5`.

    loop.py       trials with seeds of their own, counted by outcome
    kinds.py      the kinds of things that are damaged, one row each
    mutations.py  how JSON is damaged
    configs.py    config.json, with transformers as the judge

A trial is named by seed, kind and number, and `--only KIND --trial N` repeats it.
"""
