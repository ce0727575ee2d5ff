"""Speed of Macs that are not at hand: a formula, its fitted constants, and published rows.

`speed` forecasts, `terms` has the formula and `ranges` the width; `rows`, `row_shape` and
`row_forecast` read measurements and judge forecasts by them.  A machine that was calibrated is
forecast by `planner.calibrated_speed` instead.
"""
