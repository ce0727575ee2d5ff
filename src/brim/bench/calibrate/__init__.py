"""`brim calibrate`: measures this machine with one engine and fits what each unit of work costs.

`suite` says what is timed, `child` times it in a process for each environment, `fit` turns the
samples into costs, `run` does it all.  What is measured is the real engine on stand-ins of random
weights; forecasting from the result is planner.calibrated_speed's.
"""
