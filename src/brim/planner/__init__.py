"""Pure arithmetic from what a model and a machine are to how the model is loaded: no I/O, no clock.

`memory` forecasts bytes by term from a model's header; `plan` and `options` choose how to load it
and give the reason for each choice.  What a load really took is for engine and ledger to say.
"""
