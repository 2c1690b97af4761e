"""The evaluation suite of learned optimizers: `celo2-pretrain meta-eval`.

`problem` says what a task is, `tasks_*` are the tasks, `suite` lists them, `optimizers` are what is compared, `job` is
one training run, `runner` works through many of them, `analysis`, `report` and `plots` say what came out; `command` has
the options and `evaluate` carries them out.
"""
