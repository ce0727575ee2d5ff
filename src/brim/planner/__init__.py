"""Pure arithmetic from what a model and a machine are to how the model is loaded: no I/O, no clock.

`memory` forecasts bytes by term from a model's header (`kv`, `overhead`, and in `scratch` what
llama.cpp's graphs need); `plan`, `options` and `fit` choose how to load it and give the reason for
each choice; `forecast` says how fast that will be, on a calibrated machine by `calibrated_speed`,
on other Macs by `apple`.  What a load really took is for engine and ledger to say.
"""
