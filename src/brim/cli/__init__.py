"""The command line: one thin file for each subcommand, put together in app.py.

Commands parse, call what is below and print.  Answers and tables go to stdout, everything else to
stderr; errors are one sentence.  Heavy modules are imported inside functions, so that
`brim --help` pays for none of them.
"""
