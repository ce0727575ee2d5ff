"""What could make models slow, refused or lost on this machine, and the command that mends it.

`gather` asks the machine, each question in a thread with a limit; `checks_*` judge the answers and
ask nothing, so that each can be tested with what another machine said; `registry` lists them.
"""
