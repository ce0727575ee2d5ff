"""The side-by-side harness: the same workloads against any number of servers, in turn, in one run.

`server` reaches a server or starts it, `texts` and `sizes` make what is sent, `session` sends it,
`alone`, `beside`, `agents` and `mixed` are the workloads and `workloads` lists them, `harness` runs
them in turns, `report` and `checks` make rows and complaints of the samples, `plot` draws them.
"""
